"""Folders are converted between forms without losing a bit."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, make_model, save_folder
from transformers import AutoModelForCausalLM, GlmConfig, GlmForSequenceClassification
from weight_folders import assert_same_bytes, change_json, load_all, store_as, write_large

from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.weights.convert_folder import convert_folder
from glm_rlhf.parallel.weights.load import load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_folder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("form", ["one file", "two files", "one bin", "two bins"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_family_keeps_every_byte(folders, tmp_path, family, form):
    source = store_as(shutil.copytree(folders[family], tmp_path / "in"), form)
    convert_folder(source, tmp_path / "out", max_shard_bytes=50_000)
    assert_same_bytes(load_all(tmp_path / "out"), load_all(folders[family]))
    assert read_config(tmp_path / "out") == read_config(source)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert {key: after[key] for key in before if key != "dtype"} | {"dtype": 0} == before | {"dtype": 0}
    assert after["torch_dtype"] == "float32"


def test_types_that_differ_within_a_folder_are_kept(folders, tmp_path):
    source = shutil.copytree(folders["glm"], tmp_path / "in")
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    tensors = {name: t.to(kinds[i % 3]) for i, (name, t) in enumerate(sorted(load_all(source).items()))}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert_folder(source, tmp_path / "out")
    assert_same_bytes(load_all(tmp_path / "out"), tensors)


def test_a_chatglm_folder_becomes_one_that_transformers_computes_alike(folders, tmp_path):
    convert_folder(folders["chatglm"], tmp_path / "out", family="glm", max_shard_bytes=40_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = loaded(tokens).logits - make_model("glm")(tokens).logits
    assert difference.abs().max().item() == 0  # the same weights in the same order: not one rounding apart


def test_there_and_back_keeps_every_byte(folders, tmp_path):
    convert_folder(folders["glm"], tmp_path / "there", family="chatglm")
    convert_folder(tmp_path / "there", tmp_path / "back", family="glm")
    assert_same_bytes(load_all(tmp_path / "back"), load_all(folders["glm"]))
    chatglm = load_all(folders["chatglm"])
    chatglm.pop("transformer.rotary_pos_emb.inv_freq")  # a folder from glm has none to copy
    assert_same_bytes(load_all(tmp_path / "there"), chatglm)
    assert read_config(tmp_path / "back") == read_config(folders["glm"])


def test_the_rotary_base_survives_as_a_ratio(folders, tmp_path):
    source = shutil.copytree(folders["glm"], tmp_path / "in")
    change_json(source / "config.json", rope_parameters=..., rope_theta=5e6, partial_rotary_factor=0.5)
    convert_folder(source, tmp_path / "out", family="chatglm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_ratio"] == 500
    assert read_config(tmp_path / "out").rope_theta == 5e6


def test_special_tokens_cross_families_and_other_keys_do_not(folders, tmp_path):
    source = shutil.copytree(folders["chatglm"], tmp_path / "in")
    change_json(source / "config.json", eos_token_id=[2, 7], auto_map={"AutoConfig": "x.Y"})
    convert_folder(source, tmp_path / "out", family="glm")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == ([2, 7], 0)
    assert "auto_map" not in written
    assert written["architectures"] == ["GlmForCausalLM"]


@pytest.mark.parametrize(
    "family, target, message",
    [
        ("glm4", "glm", "a glm4 model cannot become glm: glm4 norms the output"),
        ("glm4", "chatglm", "a glm4 model cannot become chatglm"),
        ("chatglm", "glm4", "a chatglm model cannot become glm4"),
        ("glm", "glm4", "a glm model cannot become glm4"),
        ("glm", "llama", "family is 'llama'; it must be one of chatglm, glm, glm4"),
    ],
)
def test_other_architectures_are_refused(folders, tmp_path, family, target, message):
    with pytest.raises(ValueError, match=message):
        convert_folder(folders[family], tmp_path / "out", family=target)
    assert os.listdir(tmp_path) == []


def test_a_tied_head_has_no_chatglm_form(tmp_path):
    source = save_folder(tmp_path / "in", "glm", make_model("glm", tie_word_embeddings=True))
    with pytest.raises(ValueError, match="the chatglm form always has a head of its own"):
        convert_folder(source, tmp_path / "out", family="chatglm")
    assert os.listdir(tmp_path) == ["in"]
    convert_folder(source, tmp_path / "out")
    assert_same_bytes(load_all(tmp_path / "out"), load_all(source))


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_type_is_the_rounded_original(folders, tmp_path, dtype, kind):
    convert_folder(folders["glm"], tmp_path / "out", dtype=dtype)
    expected = {name: t.to(kind) for name, t in load_all(folders["glm"]).items()}
    assert_same_bytes(load_all(tmp_path / "out"), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kind


def test_an_unknown_type_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be same, bf16, fp16, fp32"):
        convert_folder(folders["glm"], tmp_path / "out", dtype="int8")


def test_a_reward_model_of_transformers_is_converted(folders, tmp_path):
    config = GlmConfig.from_pretrained(folders["glm"], num_labels=1)
    GlmForSequenceClassification(config).save_pretrained(tmp_path / "in")
    convert_folder(tmp_path / "in", tmp_path / "same")
    original = load_all(tmp_path / "in")
    assert_same_bytes(load_all(tmp_path / "same"), original)
    convert_folder(tmp_path / "in", tmp_path / "chatglm", family="chatglm", dtype="bf16")
    legacy = load_all(tmp_path / "chatglm")
    assert torch.equal(legacy["classifier_head.weight"], original["score.weight"])
    assert torch.equal(legacy["classifier_head.bias"], torch.zeros(1)), "the class of this form has one"
    assert legacy["transformer.encoder.final_layernorm.weight"].dtype == torch.bfloat16


def with_scalar_head(folder, target, architectures, **more):
    """A copy of a policy's folder that holds a scalar head as well."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = architectures
    path.write_text(json.dumps(config))
    name = "classifier_head" if config["model_type"] == "chatglm" else "score"
    head = {f"{name}.{part}": value for part, value in more.items()} | {f"{name}.weight": torch.ones(1, 48)}
    save_file(load_all(target) | head, target / "model.safetensors")
    return target


@pytest.mark.parametrize("architectures", [None, []])
def test_a_folder_with_two_heads_and_no_class_is_refused(folders, tmp_path, architectures):
    source = with_scalar_head(folders["glm"], tmp_path / "in", architectures)
    with pytest.raises(ModelFolderError, match=r"holds both lm_head\.weight and score\.weight, and config"):
        convert_folder(source, tmp_path / "out")


def test_a_reward_model_of_chatglms_own_class_keeps_a_vocabulary_head_that_does_not_count(folders, tmp_path):
    bias = torch.tensor([0.25])
    source = with_scalar_head(
        folders["chatglm"], tmp_path / "in", ["ChatGLMForSequenceClassification"], bias=bias
    )
    convert_folder(source, tmp_path / "out")
    stored = load_all(tmp_path / "out")
    assert torch.equal(stored["classifier_head.bias"], bias)
    assert not any("output_layer" in name for name in stored)
    with open_topology(Layout()) as topology:
        chunks, created = load_model(source, topology, role="reward", dtype=torch.float32)
    assert created == ()
    assert chunks[0].value_head.bias.item() == 0.25
    assert chunks[0].value_head.bias.requires_grad


def test_a_policy_with_a_spare_scalar_head_is_a_policy(folders, tmp_path):
    source = with_scalar_head(folders["glm"], tmp_path / "in", ["GlmForCausalLM"])
    convert_folder(source, tmp_path / "out")
    assert "lm_head.weight" in load_all(tmp_path / "out")


@pytest.mark.parametrize("value", [0.25, 0.0])
def test_the_bias_of_a_scalar_head_stays_in_every_form(folders, tmp_path, value):
    source = with_scalar_head(
        folders["chatglm"],
        tmp_path / "in",
        ["ChatGLMForSequenceClassification"],
        bias=torch.tensor([value]),
    )
    convert_folder(source, tmp_path / "glm", family="glm")
    convert_folder(tmp_path / "glm", tmp_path / "again", family="glm")
    convert_folder(tmp_path / "again", tmp_path / "chatglm", family="chatglm")
    for form in ("glm", "again"):
        stored = load_all(tmp_path / form)
        # transformers' class has none: a bias of 0 is no bias, another one keeps the scores of this project
        assert ("score.bias" in stored) == (value != 0)
        assert stored.get("score.bias", torch.zeros(1)).item() == value
    assert load_all(tmp_path / "chatglm")["classifier_head.bias"].item() == value


def test_a_source_that_breaks_off_leaves_no_target(folders, tmp_path, monkeypatch):
    from glm_rlhf.parallel.weights import hf_reader

    real, calls = hf_reader.read_slice, []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError("the disk is gone")
        real(*arguments)

    monkeypatch.setattr(hf_reader, "read_slice", breaks)
    with pytest.raises(OSError, match="the disk is gone"):
        convert_folder(folders["glm"], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_processes_share_a_conversion(folders, tmp_path):
    barrier, errors = threading.Barrier(2, timeout=120), []

    def work(rank):
        try:
            convert_folder(
                folders["chatglm"],
                tmp_path / "out",
                family="glm",
                max_shard_bytes=40_000,
                rank=rank,
                world=2,
                barrier=barrier.wait,
            )
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_same_bytes(load_all(tmp_path / "out"), load_all(folders["glm"]))


MEASURE = """
import sys
from glm_rlhf.parallel.weights.convert_folder import convert_folder
from glm_rlhf.parallel.weights.load import load_model

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
convert_folder(sys.argv[1], sys.argv[2], family="glm", dtype="bf16")
print(status("VmHWM") - before)
"""


def test_a_conversion_needs_the_memory_of_a_few_tensors(tmp_path):
    shape = {"num_layers": 8, "hidden_size": 512, "head_size": 64, "ffn_size": 4096}
    source = write_large(tmp_path / "in", "chatglm", **shape)
    total = (source / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(source)
    largest = 2 * 4096 * 512 * 4
    assert total > 12 * largest
    # one tensor read, the one before it not yet let go, their rounded copy, and what imports touch late
    assert int(output.stdout) < 4 * largest, f"{int(output.stdout) / 2**20:.0f} MiB"
    assert output.stderr == "", "no progress bar where there is no terminal"
