"""config.json of every family is read, written back, and refused with one sentence when it is wrong."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, save_folder
from transformers import AutoConfig
from weight_folders import change_json

from glm_rlhf.parallel.spec.presets import PRESETS, preset
from glm_rlhf.parallel.storage.hf_config import read_config, write_config
from glm_rlhf.parallel.storage.model_folder import ModelFolderError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_folder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def config_file(request, folders, tmp_path):
    family = getattr(request, "param", "glm")
    path = tmp_path / "config.json"
    path.write_text((folders[family] / "config.json").read_text())
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_writing_and_reading(tmp_path, name):
    write_config(PRESETS[name], tmp_path)
    assert read_config(tmp_path) == PRESETS[name]


def test_the_published_chatglm3_config_is_its_preset(shared_data):
    assert read_config(shared_data / "chatglm3") == preset("chatglm3-6b")


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'glm4-9b'; did you mean 'glm-4-9b'"):
        preset("glm4-9b")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_transformers_is_read(folders, family):
    config = read_config(folders[family])
    assert config.family == family
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (4, 48, 8, 2)
    assert (config.head_size, config.ffn_size, config.vocab_size, config.max_positions) == (8, 64, 96, 512)
    assert config.has_sandwich_norms == (family == "glm4")
    assert (config.rope_theta, config.rotary_fraction, config.has_qkv_bias) == (10000.0, 0.5, True)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_transformers_reads_what_is_written(folders, tmp_path, family):
    config = replace(read_config(folders[family]), rope_theta=123456.0, rotary_fraction=0.25, vocab_size=192)
    write_config(config, tmp_path, folders[family], dtype=torch.bfloat16)
    hf_config = AutoConfig.from_pretrained(tmp_path)
    assert hf_config.rope_parameters["rope_theta"] == 123456.0
    assert hf_config.rope_parameters["partial_rotary_factor"] == 0.25
    assert (hf_config.vocab_size, hf_config.dtype, hf_config.eos_token_id) == (192, torch.bfloat16, 2)


def test_both_places_of_the_rotary_base_are_read(config_file):
    change_json(config_file, rope_parameters=..., rope_theta=7e4, partial_rotary_factor=0.25)
    old = read_config(config_file.parent)
    new_form = {"rope_theta": 7e4, "partial_rotary_factor": 0.25, "rope_type": "default"}
    change_json(config_file, rope_theta=..., partial_rotary_factor=..., rope_parameters=new_form)
    assert read_config(config_file.parent) == old
    assert (old.rope_theta, old.rotary_fraction) == (7e4, 0.25)


@pytest.mark.parametrize("config_file", ["chatglm"], indirect=True)
def test_a_ratio_scales_the_base_of_chatglm3(config_file):
    change_json(config_file, rope_ratio=50)
    config = read_config(config_file.parent)
    assert config.rope_theta == 500000.0
    write_config(config, config_file.parent)
    assert json.loads(config_file.read_text())["rope_ratio"] == 50


@pytest.mark.parametrize("config_file", ["chatglm"], indirect=True)
@pytest.mark.parametrize("sign", ["name", "code"])
def test_a_ratio_that_divides_positions_is_refused(config_file, sign):
    name = "THUDM/chatglm2-6b-32k" if sign == "name" else "THUDM/chatglm-mine"
    change_json(config_file, rope_ratio=16, _name_or_path=name)
    if sign == "code":
        code = "seq_idx = torch.arange(seq_len, dtype=dtype) / self.rope_ratio\n"
        (config_file.parent / "modeling_chatglm.py").write_text(code)
    with pytest.raises(ModelFolderError, match=r"rope_ratio 16 divides positions .*ChatGLM2-6B-32K"):
        read_config(config_file.parent)
    change_json(config_file, rope_ratio=1)
    assert read_config(config_file.parent).rope_theta == 10000.0


def test_other_keys_of_the_source_are_kept(config_file, tmp_path):
    change_json(config_file, my_key=[1, 2], dtype="float16")
    target = tmp_path / "new"
    target.mkdir()
    write_config(read_config(tmp_path), target, tmp_path, dtype=torch.float32)
    written = json.loads((target / "config.json").read_text())
    assert written["my_key"] == [1, 2]
    assert written["torch_dtype"] == "float32"
    assert "dtype" not in written


CASES = {
    "not json": ('{"model_type": "glm",', "not JSON: line 1"),
    "a list": ("[1]", "holds a list at the top"),
    "a key twice": ('{"model_type": "glm", "model_type": "glm"}', "'model_type' stands there twice"),
    "deep": ("[" * 100_000, "config.json is not"),
    "no model_type": ({"model_type": ...}, "has no model_type"),
    "unknown family": ({"model_type": "llama"}, "'llama' is not supported; chatglm, glm, glm4 are"),
    "a list for model_type": ({"model_type": ["glm"]}, r"\['glm'\] is not supported"),
    "experts": ({"model_type": "glm4_moe"}, "'glm4_moe' is a mixture of experts, which is not supported yet"),
    "missing": ({"num_hidden_layers": ...}, "has no num_hidden_layers"),
    "negative": ({"hidden_size": -64}, "hidden_size is -64"),
    "zero": ({"head_dim": 0}, "head_dim is 0"),
    "text": ({"vocab_size": "96"}, "vocab_size is '96'"),
    "true": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "float": ({"intermediate_size": 64.5}, "intermediate_size is 64.5"),
    "huge": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; a whole number from 1 to 1024"),
    "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "epsilon": ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
    "groups": ({"num_key_value_heads": 3}, "num_heads 8 is not a multiple of num_kv_heads 3"),
    "bias": ({"attention_bias": "true"}, "attention_bias is 'true'; true or false"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "asks for 'yarn' positions"),
    "yarn of transformers 4": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "remove rope_scaling"),
    "dropout": (
        {"attention_dropout": 0.1},
        "attention_dropout is 0.1; dropout is not supported: set it to 0",
    ),
    "a surrogate": ({"my_key": "\ud800"}, "holds a lone surrogate"),
    "two bases": ({"rope_theta": 5.0}, "rope_theta is 5.0 at the top and 10000.0 under rope_parameters"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "vision": ({"vision_config": {"depth": 2}}, "vision"),
    "first generation": ({"position_encoding_2d": True}, "first ChatGLM-6B"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_config_is_refused_in_one_sentence(config_file, case):
    change, message = CASES[case]
    if isinstance(change, str):
        config_file.write_text(change)
    else:
        change_json(config_file, **change)
    with pytest.raises(ModelFolderError, match=message) as caught:
        read_config(config_file.parent)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config_file", ["chatglm"], indirect=True)
@pytest.mark.parametrize(
    "key, value",
    [
        ("add_bias_linear", True),
        ("rmsnorm", False),
        ("pre_seq_len", 128),
        ("tie_word_embeddings", True),
        ("fp32_residual_connection", True),
        ("hidden_dropout", 0.1),
        ("attention_dropout", 0.1),
        ("classifier_dropout", 0.1),
    ],
)
def test_a_chatglm_of_another_architecture_is_refused(config_file, key, value):
    change_json(config_file, **{key: value})
    with pytest.raises(ModelFolderError, match=f"{key} is {value}"):
        read_config(config_file.parent)


@pytest.mark.parametrize("config_file", ["chatglm"], indirect=True)
def test_switches_that_are_off_and_longer_positions_of_chatglm(config_file):
    off = {"hidden_dropout": 0.0, "attention_dropout": 0, "classifier_dropout": None, "rope_scaling": None}
    change_json(config_file, fp32_residual_connection=False, **off)
    read_config(config_file.parent)
    change_json(config_file, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ModelFolderError, match="rope_scaling asks for 'yarn' positions"):
        read_config(config_file.parent)


def test_an_adapter_is_refused_with_what_to_do(config_file):
    adapter = config_file.parent / "adapter_config.json"
    adapter.write_text("{}")
    with pytest.raises(ModelFolderError, match=r"holds an adapter .* merge_and_unload\(\)"):
        read_config(config_file.parent)
    config_file.unlink()  # as peft writes it
    with pytest.raises(ModelFolderError, match=r"holds an adapter .* merge_and_unload\(\)"):
        read_config(config_file.parent)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match="nowhere does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="`hf download THUDM/glm-4-9b --local-dir glm-4-9b` makes one"):
        read_config("THUDM/glm-4-9b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFolderError, match="file is a file"):
        read_config(tmp_path / "file")
    with pytest.raises(ModelFolderError, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFolderError, match="not UTF-8"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelFolderError, match=r"config\.json is a link"):
        read_config(tmp_path)


def test_a_tied_head_cannot_be_written_as_chatglm(tmp_path):
    config = replace(preset("tiny-chatglm"), has_tied_head=True)
    with pytest.raises(ValueError, match="always has a head of its own"):
        write_config(config, tmp_path)
