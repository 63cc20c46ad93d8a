"""A rank's stream holds exactly its parameters, within a memory bound, from a checked folder."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, in_family, make_model, save_folder
from transformers import GlmConfig, GlmForSequenceClassification
from weight_folders import assert_same_bytes, change_json, load_all, store_as, write_large

from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.weights.hf_reader import check_weights, iterate_shard


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_folder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders["glm"], tmp_path / "model")


def stream(folder, config=None, *, tp_rank=0, tp_size=1, layers=range(4), **options):
    config = config or read_config(folder)
    return iterate_shard(folder, config, tp_rank=tp_rank, tp_size=tp_size, layers=layers, **options)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_cut_from_the_source_s_tensors(folders, family, tp_size):
    """The expected shards are written out here, apart from the table and the pieces."""
    glm = make_model("glm4" if family == "glm4" else "glm").state_dict()
    head, groups, heads = 8, 2, 8
    for rank in range(tp_size):
        own = dict(stream(folders[family], tp_rank=rank, tp_size=tp_size))
        rows = slice(96 * rank // tp_size, 96 * (rank + 1) // tp_size)
        assert torch.equal(
            own.pop("embedding.word_embeddings.weight"), glm["model.embed_tokens.weight"][rows]
        )
        assert torch.equal(own.pop("output_layer.weight"), glm["lm_head.weight"][rows])
        assert torch.equal(own.pop("decoder.final_layernorm.weight"), glm["model.norm.weight"])
        for i in range(4):
            prefix, hf_prefix = f"decoder.layers.{i}.", f"model.layers.{i}."
            for kind in ("weight", "bias"):
                q, k, v = (glm[f"{hf_prefix}self_attn.{x}_proj.{kind}"].split(head) for x in "qkv")
                if tp_size <= groups:
                    parts = []
                    for g in range(groups * rank // tp_size, groups * (rank + 1) // tp_size):
                        parts += [*q[g * heads // groups : (g + 1) * heads // groups], k[g], v[g]]
                    qkv = own.pop(f"{prefix}self_attention.linear_qkv.{kind}")
                    assert torch.equal(qkv, torch.cat(parts))
                else:
                    g = rank * groups // tp_size
                    queries = q[heads * rank // tp_size : heads * (rank + 1) // tp_size]
                    assert torch.equal(own.pop(f"{prefix}self_attention.linear_q.{kind}"), torch.cat(queries))
                    key_value = own.pop(f"{prefix}self_attention.linear_kv.{kind}")
                    assert torch.equal(key_value, torch.cat((k[g], v[g])))
            fc1 = glm[f"{hf_prefix}mlp.gate_up_proj.weight"].chunk(2)
            fc1 = torch.cat([half.chunk(tp_size)[rank] for half in fc1])
            assert torch.equal(own.pop(f"{prefix}mlp.linear_fc1.weight"), fc1)
            fc2 = glm[f"{hf_prefix}mlp.down_proj.weight"].chunk(tp_size, dim=1)[rank]
            assert torch.equal(own.pop(f"{prefix}mlp.linear_fc2.weight"), fc2)
            projection = glm[f"{hf_prefix}self_attn.o_proj.weight"].chunk(tp_size, dim=1)[rank]
            assert torch.equal(own.pop(f"{prefix}self_attention.linear_proj.weight"), projection)
            norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
            if family == "glm4":
                norms["self_attn_bda.norm"] = "post_self_attn_layernorm"
                norms["mlp_bda.norm"] = "post_mlp_layernorm"
            for name, source in norms.items():
                assert torch.equal(own.pop(f"{prefix}{name}.weight"), glm[f"{hf_prefix}{source}.weight"])
        assert not own


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_folder_gives_the_same(folders, tmp_path, family):
    answers = []
    for form in ("one file", "two files", "one bin", "two bins"):
        folder = store_as(shutil.copytree(folders[family], tmp_path / form), form)
        answers.append(dict(stream(folder, tp_rank=1, tp_size=2)))
    for answer in answers[1:]:
        assert_same_bytes(answers[0], answer)


def test_a_stage_gets_its_part_and_no_more(folder):
    middle = stream(folder, layers=[1, 2], has_embedding=False, has_head=False)
    assert {name.split(".")[2] for name, _ in middle} == {"1", "2"}
    last = dict(stream(folder, layers=[3], has_embedding=False))
    assert "output_layer.weight" in last
    assert "embedding.word_embeddings.weight" not in last


def test_the_type_is_that_of_the_caller_or_of_the_file(folder):
    for tensor in dict(stream(folder, dtype=torch.bfloat16)).values():
        assert tensor.dtype == torch.bfloat16
    tensors = load_all(folder)
    key = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {key: tensors[key].half()}, folder / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stream(folder)}
    # float16 keys among float32 queries and values: the joined parameter keeps every bit
    assert set(kinds.values()) == {torch.float32}
    with pytest.raises(ValueError, match=r"cannot be stored as torch\.int8"):
        stream(folder, dtype=torch.int8)


def test_a_missing_scalar_head_is_named(folder):
    critic = stream(folder, role="critic", dtype=torch.bfloat16)
    assert critic.missing == ("value_head.weight",)
    assert "output_layer.weight" not in dict(critic)
    assert stream(folder, role="critic", has_head=False).missing == ()
    assert stream(folder).missing == ()


def test_a_scalar_head_of_transformers_is_read_in_float32(folder):
    config = GlmConfig.from_pretrained(folder, num_labels=1)
    model = GlmForSequenceClassification(config).bfloat16()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    reward = stream(folder, role="reward", dtype=torch.bfloat16)
    assert reward.missing == ()
    head = dict(reward)["value_head.weight"]
    assert head.dtype == torch.float32
    assert torch.equal(head, model.score.weight.float())
    with pytest.raises(
        ModelFolderError, match=r"no tensor 'lm_head\.weight'.* a policy needs a vocabulary head"
    ):
        stream(folder)


def test_a_tied_head_comes_from_the_embedding(tmp_path):
    folder = save_folder(tmp_path, "glm", make_model("glm", tie_word_embeddings=True))
    embedding = load_all(folder)["model.embed_tokens.weight"]
    assert "output_layer.weight" not in dict(stream(folder))
    last = dict(stream(folder, tp_rank=1, tp_size=2, layers=[3], has_embedding=False))
    assert torch.equal(last["output_layer.weight"], embedding[48:])
    tensors = load_all(folder)
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert "output_layer.weight" not in dict(stream(folder)), "an old folder stores the tied head twice"


def change_tensors(folder, change):
    tensors = load_all(folder)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def prefix(tensors, text):
    for name in list(tensors):
        tensors[text + name] = tensors.pop(name)


BAD = {
    "missing": (
        lambda t: t.pop("model.layers.2.mlp.down_proj.weight"),
        r"no tensor 'model\.layers\.2\.mlp\.down",
    ),
    "missing bias": (
        lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"),
        r"k_proj\.bias'; \[16\] is required",
    ),
    "transposed": (
        lambda t: t.update({"model.layers.1.mlp.down_proj.weight": torch.zeros(64, 48)}),
        r"down_proj\.weight' with the shape \[64, 48\] where config\.json requires \[48, 64\]",
    ),
    "vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(97, 48)}),
        r"embed_tokens\.weight' with the shape \[97, 48\] .* \[96, 48\]",
    ),
    "head": (
        lambda t: t.update({"lm_head.weight": torch.zeros(96)}),
        r"lm_head\.weight' with the shape \[96\]",
    ),
    "extra layer": (
        lambda t: t.update({"model.layers.4.mlp.down_proj.weight": torch.zeros(48, 64)}),
        r"'model\.layers\.4\.mlp\.down_proj\.weight' \[48, 64\], which a glm model of 4 layers does not have",
    ),
    "adapter": (lambda t: t.update({"lora_A": torch.zeros(2)}), "'lora_A'"),
    "whole numbers": (
        lambda t: t.update({"lm_head.weight": torch.zeros(96, 48, dtype=torch.int8)}),
        r"lm_head\.weight' as I8; a floating-point type",
    ),
    "whole numbers of 32 bits": (
        lambda t: t.update({"lm_head.weight": torch.zeros(96, 48, dtype=torch.int32)}),
        r"lm_head\.weight' as I32; a floating-point type",
    ),
    "a prefix of peft": (
        lambda t: prefix(t, "base_model.model."),
        r"'base_model\.model\..*', whose prefix is that of peft: merge .* with merge_and_unload\(\)",
    ),
    "a prefix of a wrapper": (
        lambda t: prefix(t, "module."),
        r"'module\..*', .* save the model inside it, model\.module",
    ),
    "a compiled model": (lambda t: prefix(t, "_orig_mod."), r"torch\.compile: save the model inside it"),
    "a value head of TRL": (
        lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 48)}),
        r"'v_head\.summary\.weight', which is TRL's value head: save .*model\.pretrained_model",
    ),
    "a LoRA": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 48)}),
        r"lora_A\.weight', which is part of a LoRA adapter",
    ),
    "8 bit floats": (
        lambda t: t.update({"lm_head.weight": torch.zeros(96, 48).to(torch.float8_e4m3fn)}),
        r"lm_head\.weight' as F8_E4M3; a floating-point type of 16 bits",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_of_another_model_is_refused_before_a_tensor_is_read(folder, case):
    change, message = BAD[case]
    change_tensors(folder, change)
    with pytest.raises(ModelFolderError, match=message) as caught:
        # a stage that needs none of the faulty tensors finds the fault like all others
        stream(folder, layers=[3], has_embedding=False, has_head=False)
    assert "\n" not in str(caught.value)


def test_the_config_of_another_family_is_refused(folders, folder):
    shutil.copyfile(folders["glm4"] / "config.json", folder / "config.json")
    with pytest.raises(
        ModelFolderError, match=r"no tensor 'model\.layers\.0\.post_self_attn_layernorm\.weight'"
    ):
        stream(folder)
    shutil.copyfile(folders["chatglm"] / "config.json", folder / "config.json")
    with pytest.raises(
        ModelFolderError, match=r"no tensor 'transformer\.embedding\.word_embeddings\.weight'"
    ):
        stream(folder)


def test_what_is_no_weight_is_passed_over(folder):
    change_tensors(folder, lambda t: t.update({"model.rotary_emb.inv_freq": torch.arange(3)}))
    assert len(dict(stream(folder))) == 3 + 4 * 7


def test_a_split_that_the_model_does_not_allow_names_the_numbers(folder):
    with pytest.raises(ValueError, match="num_heads 8 of the model is not a multiple of tp 3"):
        stream(folder, tp_size=3)
    change_json(folder / "config.json", vocab_size=97)
    config = replace(read_config(folder), vocab_size=97)
    change_tensors(
        folder,
        lambda t: t.update(
            {name: torch.zeros(97, 48) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
    )
    with pytest.raises(ValueError, match="vocab_size 97 of the model is not a multiple of tp 2"):
        stream(folder, config, tp_size=2)


def test_headers_alone_are_read_by_the_check(folder, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("glm_rlhf.parallel.weights.hf_reader.read_slice", refuse)
    check_weights(folder, read_config(folder), role="policy")


@pytest.mark.parametrize("tp_size", [1, 4])
def test_parameters_are_filled_in_place_and_cast(folders, tp_size):
    source = stream(folders["glm"], tp_rank=tp_size - 1, tp_size=tp_size)
    expected = dict(source)
    for dtype in (torch.float32, torch.bfloat16):
        parameters = {
            name: torch.nn.Parameter(torch.full(tensor.shape, torch.nan, dtype=dtype))
            for name, tensor in expected.items()
        }
        places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
        source.read_into(parameters)
        for name, parameter in parameters.items():
            assert parameter.data_ptr() == places[name]
            assert torch.equal(parameter, expected[name].to(dtype)), name
    on_device = {name: torch.empty(tensor.shape, device="meta") for name, tensor in expected.items()}
    source.read_into(on_device)  # through memory of the host
    first = next(iter(expected))
    with pytest.raises(ValueError, match=rf"{first} has the shape \[3\], required is"):
        source.read_into(parameters | {first: torch.empty(3)})


MEASURE = """
import json, sys, torch
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.hf_reader import iterate_shard

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

folder, tp_size = sys.argv[1], int(sys.argv[2])
config = read_config(folder)
stream = iterate_shard(folder, config, tp_rank=0, tp_size=tp_size, layers=range(config.num_layers))
parameters = {s.name: torch.zeros(s.shape) for s in stream.shards}  # a model, its pages touched
for tensor in parameters.values():
    tensor.fill_(1.0)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of what came before
before = status("VmRSS")
stream.read_into(parameters)
shard = sum(t.numel() * 4 for t in parameters.values())
largest = max(t.numel() * 4 for t in parameters.values())
print(json.dumps([before, status("VmHWM"), shard, largest]))
"""


@pytest.mark.parametrize("form, tp_size", [("two files", 1), ("two bins", 2)])
def test_memory_stays_below_the_shard_and_one_tensor(big_folder, tmp_path, form, tp_size):
    folder = store_as(shutil.copytree(big_folder, tmp_path / "big"), form)
    command = [sys.executable, "-c", MEASURE, str(folder), str(tp_size)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shutil.rmtree(folder)
    before, peak, shard, largest = json.loads(output)
    assert shard > 80 * 2**20, "large enough for a second copy to show"
    # the parameters, one shard, stand in `before`
    above = (peak - before) / 2**20
    assert peak - before < 0.2 * shard + largest, f"{above:.0f} MiB above a shard of {shard / 2**20:.0f}"


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory):
    """A checkpoint of 180 MiB whose largest tensor has 16."""
    shape = {"num_layers": 12, "hidden_size": 512, "head_size": 64, "ffn_size": 2048, "vocab_size": 8192}
    folder = write_large(tmp_path_factory.mktemp("big") / "glm", "glm", **shape)
    yield folder
    shutil.rmtree(folder)


def test_the_hand_written_chatglm_form_is_what_the_table_reads(folders):
    glm = {name: t.clone() for name, t in make_model("glm").state_dict().items()}
    stored = load_all(folders["chatglm"])
    stored.pop("transformer.rotary_pos_emb.inv_freq")
    assert_same_bytes(stored, in_family("chatglm", glm))
