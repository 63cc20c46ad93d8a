"""Vocabularies of base64 ranks, as GLM-4 carries them."""

import base64
import itertools
import json
import random

import pytest

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer
from glm_rlhf.engine.data.tokenizer.tiktoken_vocab import (
    byte_letters,
    byte_level_bpe,
    is_ranks_file,
    read_ranks,
)


def random_ranks(alphabet: bytes, num_tokens: int, seed: int) -> dict[bytes, int]:
    generator = random.Random(seed)
    tokens = {bytes([byte]): byte for byte in range(256)}
    pool = [bytes([byte]) for byte in alphabet]
    while len(tokens) < num_tokens:
        token = generator.choice(pool) + generator.choice(pool)
        if token not in tokens and len(token) < 12:
            tokens[token] = len(tokens)
            pool.append(token)
    return tokens


def merged_as_tiktoken_does(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        joined = [(ranks.get(left + right), i) for i, (left, right) in enumerate(itertools.pairwise(parts))]
        known = [(rank, i) for rank, i in joined if rank is not None]
        if not known:
            return [ranks[part] for part in parts]
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def write_ranks(folder, ranks: dict[bytes, int]):
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


@pytest.mark.parametrize(("alphabet", "num_tokens"), [(b"ab", 300), (b"abc", 400), (b"abcdefgh", 900)])
def test_words_merge_as_by_rank(alphabet, num_tokens):
    ranks = random_ranks(alphabet, num_tokens, seed=num_tokens)
    encoder = byte_level_bpe(ranks)
    generator = random.Random(1)
    for _ in range(400):
        word = bytes(generator.choice(alphabet) for _ in range(generator.randrange(1, 25)))
        assert encoder.encode(word.decode()).ids == merged_as_tiktoken_does(word, ranks)


def test_text_is_cut_into_words_before_merging():
    ranks = random_ranks(b"", 256, seed=0) | {b"12": 256, b"234": 257, b"b ": 258, b" c": 259, b"\n\n": 260}
    encoder = byte_level_bpe(ranks)
    one = {chr(byte): byte for byte in range(128)}
    # Digits are grouped in threes, a space belongs to the next word, line breaks form one word.
    assert encoder.encode("1234").ids == [256, one["3"], one["4"]]
    assert encoder.encode("b c").ids == [one["b"], 259]
    assert encoder.encode("b\n\nc").ids == [one["b"], 260, one["c"]]


def test_letters_stand_for_bytes_as_in_gpt2():
    letters = byte_letters()
    assert len(set(letters)) == 256
    assert (letters[ord("A")], letters[ord(" ")], letters[ord("\n")], letters[0xAD]) == ("A", "Ġ", "Ċ", "Ń")


def test_a_remote_code_folder_loads_and_numbers_its_markers_behind_the_ranks(tmp_path):
    ranks = random_ranks(b"What is plus", 400, seed=3)
    write_ranks(tmp_path, ranks)
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.id_of(name) for name in ("<|endoftext|>", "[gMASK]", "<sop>")] == [400, 402, 404]
    assert [tokenizer.id_of(f"<|{role}|>") for role in ("system", "user", "assistant", "observation")] == [
        *(406, 407, 408, 409)
    ]
    assert tokenizer.id_of("<|end_of_video|>") == 413
    text = "What is 3 plus 4 <|user|> 你好 🙂\n\n"
    ids = tokenizer.encode(text)
    assert max(ids) < 400
    assert tokenizer.decode(ids) == text
    rendered = tokenizer.render([Message(role="user", content="hi")], add_generation_prompt=True)
    assert rendered == [402, 404, 407, *tokenizer.encode("\nhi"), 408]


def test_declared_ids_win_over_counting(tmp_path):
    write_ranks(tmp_path, random_ranks(b"abc", 300, seed=4))
    names = [
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ]
    declared = {str(310 + i): {"content": name, "special": True} for i, name in enumerate(names)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.id_of("<sop>") == 312
    for special in (True, False):
        added = declared | {"318": {"content": "<|step|>", "special": special}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        with_word = load_tokenizer(tmp_path)
        ids = with_word.encode("ab<|step|>c<|user|>")
        assert ids == [*tokenizer.encode("ab"), 318, *tokenizer.encode("c<|user|>")]
        assert with_word.decode(ids) == "ab<|step|>c<|user|>"
        assert with_word.unsampleable_ids(320).tolist()[317:] == [True, False, True]
    assert tokenizer.ids_without_token(320).nonzero().flatten().tolist() == [*range(300, 310), 317, 318, 319]
    declared["299"] = declared.pop("310")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    with pytest.raises(ValueError, match="id 299, which is a rank"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"!!! 256\n", "257: expected a base64 token"),
        (b"YWI= x\n", "257: expected a base64 token"),
        (b"YWFh" * 400 + b" 256\n", "257: a token has 1200 bytes"),
        (b"YWI=\n", "257: expected a base64 token"),
        (b"YQ== 256\n", r"257: token b'a' is empty or a duplicate"),
        (b"YWI= 97\n", "one rank to two tokens"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    write_ranks(tmp_path, random_ranks(b"", 256, seed=0))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=says):
        read_ranks(path)


def test_a_file_without_all_bytes_is_refused(tmp_path):
    write_ranks(tmp_path, {bytes([byte]): byte for byte in range(255)})
    with pytest.raises(ValueError, match="lacks 1 single bytes, the first 0xff"):
        read_ranks(tmp_path / "tokenizer.model")


def test_a_sentencepiece_model_is_no_ranks_file(tiny_model):
    assert not is_ranks_file(tiny_model)
