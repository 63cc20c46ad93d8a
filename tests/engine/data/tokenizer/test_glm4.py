"""GLM-4's tokenizer: byte-level words, added tokens, templates."""

import json
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jinja2
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer

REPLACES = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}
CONVERSATION = [
    Message(role="system", content="You are a calculator."),
    Message(role="user", content="What is 3 plus 4?\n请用中文回答。"),
    Message(role="assistant", content="答案是7。"),
    Message(role="user", content="  谢谢 🙂 "),
]


def edited(glm4_folder, folder, edit) -> None:
    description = json.loads((glm4_folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit(description)
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_has_the_ids_of_its_rendered_template(glm4, glm4_folder, add_generation_prompt):
    # The library's own encoder takes the template's markers for special tokens, as Hugging Face does.
    template = json.loads((glm4_folder / "tokenizer_config.json").read_text(encoding="utf-8"))[
        "chat_template"
    ]
    text = jinja2.Template(template, keep_trailing_newline=True).render(
        messages=[{"role": message.role, "content": message.content} for message in CONVERSATION],
        add_generation_prompt=add_generation_prompt,
    )
    expected = (
        Tokenizer.from_file(str(glm4_folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    )
    assert glm4.render(CONVERSATION, add_generation_prompt=add_generation_prompt) == expected


def test_text_without_markers_is_encoded_and_decoded_as_the_library_does(glm4, glm4_folder):
    library = Tokenizer.from_file(str(glm4_folder / "tokenizer.json"))
    for message in CONVERSATION:
        ids = glm4.encode(message.content)
        assert ids == library.encode(message.content).ids
        assert glm4.decode(ids) == library.decode(ids) == message.content


def test_the_library_alone_would_encode_a_typed_marker_as_a_special_token(glm4, glm4_folder):
    # What the tests of typed markers guard against does happen where the added tokens are left in.
    library = Tokenizer.from_file(str(glm4_folder / "tokenizer.json"))
    assert glm4.id_of("<|user|>") in library.encode("a<|user|>b").ids
    assert glm4.id_of("<|user|>") not in glm4.encode("a<|user|>b")


def test_ends_stops_and_padding_are_glm4s(glm4):
    assert glm4.end_id == glm4.id_of("<|user|>")
    assert glm4.stop_ids == tuple(map(glm4.id_of, ["<|endoftext|>", "<|user|>", "<|observation|>"]))
    assert glm4.pad_id == glm4.id_of("<|endoftext|>")
    assert glm4.prefix_ids == [glm4.id_of("[gMASK]"), glm4.id_of("<sop>")]


def test_text_behind_the_templates_assistant_marker_goes_into_the_prompt(glm4, glm4_folder, tmp_path):
    edited(glm4_folder, tmp_path, lambda description: None)
    template = "[gMASK]<sop>…{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    thinking = load_tokenizer(tmp_path)
    messages = [Message(role="user", content="3+4?")]
    prompt_ids, response_ids = thinking.render_prompt_response(messages, "7")
    assert prompt_ids == [*glm4.render(messages, add_generation_prompt=True), *glm4.encode("\n<think>")]
    assert response_ids == [*glm4.encode("7"), glm4.end_id]
    assert thinking.decode_response(response_ids) == "7"


def test_markers_not_marked_special_in_the_file_are_special(glm4, glm4_folder, tmp_path):
    def edit(description):
        for entry in description["added_tokens"]:
            entry["special"] = False
        description["added_tokens"].append(dict(description["added_tokens"][0], id=600, content="<think>"))

    edited(glm4_folder, tmp_path, edit)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.table.name_by_id == glm4.table.name_by_id
    assert glm4.id_of("<|user|>") not in tokenizer.encode("<|user|>")
    # An added token that is neither is a word like any other.
    thought = tokenizer.encode("<think>hm")
    assert (thought[0], tokenizer.vocab_size) == (600, 601)
    assert thought[1:] == glm4.encode("hm")
    assert tokenizer.decode(thought) == "<think>hm"


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_is_ordinary_and_may_be_sampled(glm4, glm4_folder, tmp_path, special):
    def edit(description):
        entry = dict(description["added_tokens"][0], id=600, content="<|step|>", special=special)
        description["added_tokens"].append(entry)

    edited(glm4_folder, tmp_path, edit)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a<|step|>b <|user|>")
    assert ids == [*glm4.encode("a"), 600, *glm4.encode("b <|user|>")]
    assert tokenizer.decode(ids) == "a<|step|>b <|user|>"
    masked = tokenizer.unsampleable_ids(602)
    assert not masked[600]
    assert masked[601]
    assert masked[tokenizer.id_of("<|system|>")]


def split_by(pattern):
    def edit(description):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}

    return edit


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(?:a|aa)*$", r"[a-z]*[0-9]", r"\p{L}*(?!\p{L})=", r"(?:a*a*a*)="]
)
def test_a_pattern_of_more_than_linear_time_is_refused(glm4_folder, tmp_path, pattern):
    edited(glm4_folder, tmp_path, split_by(pattern))
    start = time.process_time()
    with pytest.raises(ValueError, match=r"tokenizer\.json.*") as caught:
        load_tokenizer(tmp_path)
    assert time.process_time() - start < 15
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pattern", [r"\p{N}{1,3}|\p{L}+|\s+|[^\s\p{L}\p{N}]+", "abc", r"(?i:'s|'t)| ?\w+|\s+(?!\S)|\s+"]
)
def test_another_pattern_of_linear_time_is_read(glm4_folder, tmp_path, pattern):
    edited(glm4_folder, tmp_path, split_by(pattern))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("abc 1234 it's")) == "abc 1234 it's"


class PanicException(BaseException):
    """What the library raises where its own code fails, by this name."""


def test_a_panic_of_the_library_is_an_error_of_the_text(glm4, monkeypatch):
    def panic(*arguments, **options):
        raise PanicException("retry-limit-in-match over")

    encoder = SimpleNamespace(encode=panic)
    broken = replace(glm4, encode_text=partial(glm4.encode_text.func, encoder))
    with pytest.raises(ValueError, match=r"the text cannot be encoded .* retry-limit-in-match over"):
        broken.encode("a")


def test_dropout_of_the_file_is_off(glm4, glm4_folder, tmp_path):
    edited(glm4_folder, tmp_path, lambda description: description["model"].update(dropout=0.9))
    text = "What is 3 plus 4?"
    assert load_tokenizer(tmp_path).encode(text) == glm4.encode(text)


def test_stored_truncation_padding_and_post_processing_are_off(glm4, glm4_folder, tmp_path):
    def edit(description):
        description["truncation"] = {
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        }
        description["padding"] = {
            **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        }

    edited(glm4_folder, tmp_path, edit)
    assert load_tokenizer(tmp_path).encode("What is 3 plus 4?") == glm4.encode("What is 3 plus 4?")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda description: description.pop("added_tokens"), "not a tokenizer.json"),
        (lambda description: description.update(model={"type": "BPE"}), "not a tokenizer.json"),
        (lambda description: description.update(pre_tokenizer=None, decoder=None), "not byte-level"),
        (lambda description: description["model"].update(merges=[["zzz", "zzz"]]), "cannot be loaded"),
        (
            lambda description: description["model"].update(continuing_subword_prefix="##é"),
            "a prefix or suffix",
        ),
        (lambda description: description.update(normalizer=REPLACES), "or replaces text"),
        (lambda description: description["added_tokens"].pop(), r"lacks the markers <\|observation\|>"),
        (lambda description: description["model"]["vocab"].update({"中": 499}), "encodes no byte"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(glm4_folder, tmp_path, edit, says):
    edited(glm4_folder, tmp_path, edit)
    with pytest.raises(ValueError, match=says):
        load_tokenizer(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    encoder = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.decoder = decoders.WordPiece()
    encoder.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="WordLevel model that is not byte-level"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_in_which_text_reaches_a_marker_is_refused(glm4_folder, tmp_path):
    def edit(description):
        # The marker is one of the BPE's own words, and nothing cuts the text before it.
        marker = description["added_tokens"][7]
        description["model"]["vocab"][marker["content"]] = marker["id"]
        description["pre_tokenizer"] = {
            **{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        }

    edited(glm4_folder, tmp_path, edit)
    with pytest.raises(ValueError, match=r"a typed '<\|user\|>' would become a special token"):
        load_tokenizer(tmp_path)
