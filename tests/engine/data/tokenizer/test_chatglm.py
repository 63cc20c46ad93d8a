"""The sentencepiece tokenizer of ChatGLM: ids, special tokens, round trips."""

import json
import pickle
import shutil

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)
SAMPLES = [
    "鲁迅和周树人是同一个人吗？请说明理由。",
    "The quick brown fox doesn't jump -- it waits…",
    "🤗👍🏽👩‍👩‍👧‍👦🇨🇳 emoji, joined and flagged",
    "def f(x):\n    return {k: v for k, v in x.items()}  # \t tabs\r\n\n\nend",
    "مرحبا بالعالم שלום \u202eright to left\u202c",
    "  leading, trailing and   inner spaces   ",
    "ｆｕｌｌ　ｗｉｄｔｈ ①½ e\u0301 é \u00a0 \u200b \ufeff \x00 \x7f",
    "<0x0A> <s> </s> ⁇ ",
    "",
    " ",
    "\n",
]


@pytest.fixture(scope="session")
def pieces(real_folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(real_folder / "tokenizer.model"))


def user(text: str) -> Message:
    return Message(role="user", content=text)


def test_chatglm3s_special_tokens_stand_behind_the_pieces(chatglm3):
    assert chatglm3.table.name_by_id == {
        **{0: "<unk>", 1: "<s>", 2: "</s>"},
        **{64789: "[MASK]", 64790: "[gMASK]", 64791: "[sMASK]", 64792: "sop", 64793: "eop"},
        **{64794: "<|system|>", 64795: "<|user|>", 64796: "<|assistant|>", 64797: "<|observation|>"},
    }
    assert chatglm3.vocab_size == 64798
    assert chatglm3.prefix_ids == [64790, 64792]
    assert (chatglm3.end_id, chatglm3.pad_id) == (2, 0)
    assert chatglm3.stop_ids == (2, 64795, 64797)


def test_chatglm2_has_the_same_table_without_roles_and_one_stop(chatglm2):
    assert chatglm2.vocab_size == 64794
    assert chatglm2.id_of("eop") == 64793
    assert (chatglm2.stop_ids, chatglm2.end_id) == ((2,), 2)
    with pytest.raises(ValueError, match=r"'<\|user\|>' is not a special token"):
        chatglm2.id_of("<|user|>")


def test_rows_without_a_token_are_those_from_64798_on(chatglm3):
    assert chatglm3.ids_without_token(65024).nonzero().flatten().tolist() == list(range(64798, 65024))


def test_only_ordinary_tokens_stops_and_a_further_turn_may_be_sampled(chatglm3):
    never = set(chatglm3.unsampleable_ids(65024).nonzero().flatten().tolist())
    templates_own = {"<unk>", "<s>", "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>"}
    assert never == {chatglm3.id_of(name) for name in templates_own} | set(range(64798, 65024))


def test_an_embedding_smaller_than_the_vocabulary_is_refused(chatglm3):
    with pytest.raises(ValueError, match="64000 rows"):
        chatglm3.unsampleable_ids(64000)


@pytest.mark.parametrize("text", SAMPLES)
def test_ids_and_text_are_sentencepieces_own(chatglm3, pieces, text):
    ids = chatglm3.encode(text)
    assert ids == pieces.encode(text)
    assert chatglm3.decode(ids) == pieces.decode(ids) == text


@given(text=ANY_TEXT)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_but_the_space_sign_comes_back(chatglm3, text):
    assert chatglm3.decode(chatglm3.encode(text)) == text
    assert chatglm3.decode_response(chatglm3.render_response(text)) == text


def test_the_space_sign_comes_back_as_a_space(chatglm3):
    assert chatglm3.decode(chatglm3.encode("a\u2581b")) == "a b"


@given(ids=st.lists(st.integers(259, 64788), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pieces_decode_as_sentencepiece_decodes_them(chatglm3, pieces, ids):
    assert chatglm3.decode(ids) == pieces.decode(ids)


def test_a_chat_input_has_chatglm3s_ids(chatglm3, pieces):
    # [gMASK] sop <|user|> "▁" "\n" "▁你" "好" <|assistant|>
    assert chatglm3.render([user("你好")], add_generation_prompt=True) == [
        *(64790, 64792, 64795, 30910, 13, 36474, 54591, 64796)
    ]
    messages = [
        Message(role="system", content="You are kind."),
        user("hi"),
        Message(role="assistant", content="call()", metadata="tool"),
        Message(role="observation", content="22"),
    ]
    newline = pieces.encode("\n")
    assert chatglm3.render(messages, add_generation_prompt=True) == [
        *(64790, 64792),
        *(64794, *newline, *pieces.encode("You are kind.")),
        *(64795, *newline, *pieces.encode("hi")),
        *(64796, *pieces.encode("tool\n"), *pieces.encode("call()")),
        *(64797, *newline, *pieces.encode("22")),
        64796,
    ]
    assert chatglm3.render(messages, add_generation_prompt=False)[-1] != 64796


def test_a_training_answer_is_header_text_and_end(chatglm3, pieces):
    prompt_ids, response_ids = chatglm3.render_prompt_response([user("1+1?")], "2")
    assert prompt_ids == chatglm3.render([user("1+1?")], add_generation_prompt=True)
    assert response_ids == [*pieces.encode("\n"), *pieces.encode("2"), 2]
    # Prompt and answer together are the conversation as one, and the end.
    both = [user("1+1?"), Message(role="assistant", content="2")]
    assert prompt_ids + response_ids == [*chatglm3.render(both, add_generation_prompt=False), 2]


def test_chatglm2s_rounds_have_the_published_ids(chatglm2):
    ids = chatglm2.render([user("你好")], add_generation_prompt=True)
    # [gMASK] sop, then "[Round 1]\n\n问：" as seen in a public log of ChatGLM2's own tokenizer.
    assert ids[:12] == [64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211]
    assert chatglm2.decode(ids) == "[Round 1]\n\n问：你好\n\n答："
    prompt_ids, response_ids = chatglm2.render_prompt_response([user("你好")], "你好！")
    assert (prompt_ids, response_ids[-1]) == (ids, 2)
    assert chatglm2.decode_response(response_ids) == "你好！"


def test_alignbenchs_questions_come_back(chatglm3, shared_data):
    lines = (shared_data / "alignbench" / "data_v1.1_release.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    assert len(questions) == 683
    for question in questions:
        ids = chatglm3.encode(question)
        assert chatglm3.decode(ids) == question
        stream = chatglm3.stream()
        assert "".join([stream.push(token) for token in ids]) + stream.finish() == question


def test_gsm8ks_answers_come_back(chatglm3, shared_data):
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    for line in lines:
        answer = json.loads(line)["answer"]
        assert chatglm3.decode_response(chatglm3.render_response(answer)) == answer


def test_a_word_of_100k_characters_is_encoded(chatglm3):
    word = "龘a" * 50_000
    assert chatglm3.decode(chatglm3.encode(word)) == word


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"tokenizer_config.json": {"chat_template": "[gMASK]sop<|{{ message['role'] }}|>"}}, "chatglm3"),
        ({"tokenizer_config.json": {"name_or_path": "THUDM/chatglm2-6b"}}, "chatglm2"),
        ({"tokenizer_config.json": {"name_or_path": "THUDM/chatglm3-6b-32k"}}, "chatglm3"),
        ({"config.json": {"_name_or_path": "THUDM/chatglm2-6b", "eos_token_id": 2}}, "chatglm2"),
        ({"tokenization_chatglm.py": 'specials = ["sop", "eop"]'}, "chatglm2"),
        ({"tokenization_chatglm.py": 'specials = ["sop", "<|user|>"]'}, "chatglm3"),
    ],
)
def test_chatglm2_and_chatglm3_are_distinguished(tmp_path, tiny, tiny_model, files, version):
    shutil.copy(tiny_model, tmp_path)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_tokenizer(tmp_path).chat.name == version
    other = {"chatglm2": "chatglm3", "chatglm3": "chatglm2"}[version]
    assert load_tokenizer(tmp_path, chat_format=other).chat.name == other


def test_a_folder_of_unknown_version_asks_for_it(tmp_path, tiny_model):
    shutil.copy(tiny_model, tmp_path)
    with pytest.raises(ValueError, match="pass chat_format=chatglm2 or chat_format=chatglm3"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="not 'glm4'"):
        load_tokenizer(tmp_path, chat_format="glm4")


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"632": {"content": "sop"}}, "'sop' id 632, but after the 631 pieces .* id 634"),
        ({"637": {"content": "<|tool|>"}}, "'<|tool|>' id 637"),
        ({"x": {"content": "sop"}}, "names no token"),
        ({"640": "sop"}, "names no token"),
        ([], "must be an object"),
    ],
)
def test_declared_tokens_that_contradict_the_table_are_refused(tmp_path, tiny_model, declared, says):
    shutil.copy(tiny_model, tmp_path)
    config = {"name_or_path": "chatglm3", "added_tokens_decoder": declared}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says.replace("|", r"\|")):
        load_tokenizer(tmp_path)


def with_added_tokens(folder, tiny_model, declared, **config):
    shutil.copy(tiny_model, folder)
    config = {"name_or_path": "chatglm3", "added_tokens_decoder": declared} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_behind_the_table_are_ordinary(tmp_path, tiny_model, special):
    declared = {
        "2": {"content": "</s>"},
        "632": {"content": "[gMASK]"},
        "641": {"content": "<|step|>", "special": special},
        "642": {"content": "<|step|>>", "special": special},
    }
    tokenizer = with_added_tokens(tmp_path, tiny_model, declared)
    assert tokenizer.vocab_size == 643
    assert tokenizer.ids_without_token(644).nonzero().flatten().tolist() == [640, 643]
    masked = tokenizer.unsampleable_ids(644)
    assert not masked[641]
    assert masked[632]
    plain = load_tokenizer(tiny_model.parent)
    for text in ("a<|step|>b", "<|step|>", " a <|step|> b", "<|step|><|step|>>", "3 plus 4\n<|step|>\n"):
        ids = tokenizer.encode(text)
        assert 641 in ids
        assert tokenizer.decode(ids) == text
        streamed = tokenizer.stream()
        assert "".join(map(streamed.push, ids)) + streamed.finish() == text
        assert tokenizer.decode_response(tokenizer.render_response(text)) == text
    assert tokenizer.encode("a<|step|>b") == [*plain.encode("a"), 641, *plain.encode("b")]
    assert tokenizer.encode("<|user|> sop") == plain.encode("<|user|> sop"), "markers stay text"
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<|step|>") == [641]


def test_added_tokens_with_a_part_stay_special(tmp_path, tiny_model):
    """The end of an answer and the padding must not be typed."""
    declared = {"641": {"content": "<|im_end|>"}, "642": {"content": "<|pad|>"}, "643": {"content": "<|a|>"}}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 641]}))
    tokenizer = with_added_tokens(tmp_path, tiny_model, declared, pad_token={"content": "<|pad|>"})
    assert tokenizer.id_of("<|im_end|>") == 641
    assert {641, 642}.isdisjoint(tokenizer.encode("<|im_end|><|pad|>"))
    assert tokenizer.decode([641, 642, 643]) == "<|a|>"
    assert tokenizer.unsampleable_ids(644)[[641, 642, 643]].tolist() == [False, True, False]
