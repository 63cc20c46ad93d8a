"""The small tokenizer of our own."""

import sentencepiece

from glm_rlhf.engine.commands.demo.toy_tokenizer import NUM_IDS, training_text, write_tiny_tokenizer


def pieces_of(path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return model.id_to_piece(list(range(model.vocab_size())))


def test_the_committed_model_is_what_the_script_trains(tmp_path, tiny_model):
    folder = write_tiny_tokenizer(tmp_path / "new")
    assert pieces_of(folder / "tokenizer.model") == pieces_of(tiny_model)
    assert (folder / "tokenizer_config.json").read_bytes() == (
        tiny_model.parent / "tokenizer_config.json"
    ).read_bytes()
    assert tiny_model.stat().st_size < 100_000


def test_it_loads_as_chatglm3_with_640_ids(tiny):
    assert (tiny.chat.name, tiny.vocab_size) == ("chatglm3", NUM_IDS)
    assert not tiny.ids_without_token(NUM_IDS).any()


def test_digits_are_tokens_of_their_own_and_its_text_is_short_and_comes_back(tiny):
    assert [tiny.decode([token]) for token in tiny.encode("12345")] == ["", "1", "2", "3", "4", "5"]
    lines = list(training_text())
    ids = [tiny.encode(line) for line in lines]
    assert [tiny.decode(line_ids) for line_ids in ids] == lines
    # Three characters a token and more would be strange for 640 ids, one or less would be no training.
    assert 1.3 < sum(map(len, lines)) / sum(map(len, ids)) < 3


def test_unseen_characters_fall_back_to_bytes(tiny):
    ids = tiny.encode("龘")
    assert len(ids) == 1 + len("龘".encode())
    assert tiny.decode(ids) == "龘"
