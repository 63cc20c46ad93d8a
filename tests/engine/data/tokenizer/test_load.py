"""Loading a tokenizer by what lies in its folder."""

import json
import os
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


@pytest.mark.parametrize("eos", [640, -1, "2", True, 2.0, {"a": 2}, [2, 9999], [2, None], [[2]], ["2"]])
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
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list at the top"),
        ("config.json", b"\xff\xfe{}", "config.json is not UTF-8 text"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, says):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@pytest.mark.parametrize("family", ["chatglm3", "glm4"])
def test_a_byte_order_mark_changes_nothing(folder, glm4_folder, tmp_path, family):
    if family == "glm4":
        folder = shutil.copytree(glm4_folder, tmp_path / "glm4")
    (folder / "config.json").write_text('{"eos_token_id": [2]}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [3]}')
    template = "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    before = load_tokenizer(folder)
    for name in (*CONFIGS, "tokenizer.json"):
        if (folder / name).exists():
            (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    after = load_tokenizer(folder)
    assert after.table == before.table
    assert after.stop_ids == before.stop_ids
    assert after.chat.opening == before.chat.opening
    assert {2, 3} <= set(after.stop_ids)


@pytest.mark.parametrize("name", [*CONFIGS, "tokenizer.model", "tokenizer.json"])
def test_a_pipe_is_refused_at_once(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "chat_template.jinja":  # only GLM-4's is read
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{name} is not a regular file"):
        load_tokenizer(folder)


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is a link out of the model's own folder"):
        load_tokenizer(folder)


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
