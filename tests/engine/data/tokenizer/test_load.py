"""Loading a tokenizer by what lies in its folder."""

import json
import shutil

import pytest

from glm_rlhf.engine.data.tokenizer.load import load_tokenizer


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A ChatGLM3 folder to be spoilt."""
    shutil.copytree(tiny_model.parent, tmp_path / "model")
    return tmp_path / "model"


def test_the_folder_or_its_file_is_given(folder, glm4_folder):
    assert load_tokenizer(folder / "tokenizer.model").chat.name == "chatglm3"
    assert load_tokenizer(str(folder)).chat.name == "chatglm3"
    assert load_tokenizer(glm4_folder / "tokenizer.json").chat.name == "glm4"


def test_sentencepiece_is_preferred_to_a_tokenizer_json_beside_it(folder, glm4_folder):
    shutil.copy(glm4_folder / "tokenizer.json", folder)
    assert load_tokenizer(folder).chat.name == "chatglm3"


@pytest.mark.parametrize(
    ("eos", "stops"),
    [
        (None, (2, 637, 639)),
        (2, (2, 637, 639)),
        ([2, 635], (2, 637, 639, 635)),
        ([], (2, 637, 639)),
        (0, (2, 637, 639, 0)),  # equal to padding
    ],
)
def test_stops_of_the_configs_join_the_forms_own(folder, eos, stops):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == stops
    assert not tokenizer.unsampleable_ids(640)[list(stops)].any()


@pytest.mark.parametrize("eos", [640, -1, "2", True, [2, 9999]])
def test_a_stop_no_token_has_is_refused(folder, eos):
    (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id .* ids from 0 to 639"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.model", b"", "is empty"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("tokenizer.model", b"\x00\x01not a model", "not a sentencepiece model"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "must hold a JSON object, not list"),
        ("config.json", b"\xff\xfe{}", "config.json is not JSON"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, says):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_a_truncated_model_is_refused(folder):
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(folder)


def test_what_is_no_model_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(tmp_path / "absent")


def test_a_chat_format_that_does_not_fit_is_refused(folder, glm4_folder):
    with pytest.raises(ValueError, match="must be one of auto, chatglm2"):
        load_tokenizer(folder, chat_format="llama")
    with pytest.raises(ValueError, match="its chat format is glm4, not chatglm3"):
        load_tokenizer(glm4_folder, chat_format="chatglm3")


def test_code_in_the_folder_is_not_run(folder):
    for name in ("tokenization_chatglm.py", "tokenizer.py", "__init__.py"):
        (folder / name).write_text("<|user|>\nraise SystemExit('this was run')\n")
    assert load_tokenizer(folder).chat.name == "chatglm3"
