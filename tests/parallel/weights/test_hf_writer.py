"""Shards are exported to the bytes that they were imported from."""

import json
import random
import threading

import pytest
import torch
from tiny_models import FAMILIES, make_model, save_folder
from transformers import GlmForSequenceClassification
from weight_folders import assert_same_bytes, load_all

from glm_rlhf.parallel.storage.folder_writer import Writers
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.hf_reader import iterate_shard
from glm_rlhf.parallel.weights.hf_writer import export_tensors, writer_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_folder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def gather(folder, tp_size, **options):
    """Return {our name: one tensor a rank}, as a gather over the tensor-parallel group gives it."""
    config = read_config(folder)
    ranks = [
        dict(iterate_shard(folder, config, tp_rank=r, tp_size=tp_size, layers=range(4), **options))
        for r in range(tp_size)
    ]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def export(folder, target, gathered, tp_size=1, dtype=torch.float32, **options):
    config = options.pop("config", None) or read_config(folder)
    export_tensors(target, config, gathered.items(), tp_size=tp_size, dtype=dtype, **options)
    return target


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_give_the_same_bytes(folders, tmp_path, family, tp_size, max_shard_bytes):
    gathered = gather(folders[family], tp_size)
    target = export(
        folders[family],
        tmp_path / "out",
        gathered,
        tp_size,
        source=folders[family],
        max_shard_bytes=max_shard_bytes,
    )
    assert_same_bytes(load_all(target), load_all(folders[family]))
    assert read_config(target) == read_config(folders[family])
    assert ((target / "model.safetensors").exists(), max_shard_bytes) in [(True, 10**9), (False, 30_000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_give_the_same_bytes(folders, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("glm_rlhf.parallel.weights.hf_writer._BLOCK_BYTES", 1000)
    target = export(folders["glm"], tmp_path / "out", gather(folders["glm"], 4), 4, dtype=dtype)
    expected = {name: tensor.to(dtype) for name, tensor in load_all(folders["glm"]).items()}
    assert_same_bytes(load_all(target), expected)


def test_the_order_of_the_parameters_does_not_matter(folders, tmp_path):
    gathered = list(gather(folders["chatglm"], 4).items())
    random.Random(0).shuffle(gathered)
    export(folders["chatglm"], tmp_path / "out", dict(gathered), 4, source=folders["chatglm"])
    assert_same_bytes(load_all(tmp_path / "out"), load_all(folders["chatglm"]))


def test_inv_freq_is_copied_only_from_a_source(folders, tmp_path):
    gathered = gather(folders["chatglm"], 1)
    without = load_all(export(folders["chatglm"], tmp_path / "out", gathered))
    original = load_all(folders["chatglm"])
    assert original.keys() - without.keys() == {"transformer.rotary_pos_emb.inv_freq"}


def test_transformers_loads_an_export(folders, tmp_path):
    original = make_model("glm")
    target = export(folders["glm"], tmp_path / "out", gather(folders["glm"], 2), 2, dtype=torch.bfloat16)
    loaded, report = type(original).from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    expected = {name: tensor.bfloat16() for name, tensor in original.state_dict().items()}
    assert_same_bytes(dict(loaded.state_dict()), expected)


def test_tokenizer_and_settings_come_along(folders, tmp_path):
    source = tmp_path / "source"
    save_folder(source, "chatglm")
    for name in (
        "tokenizer.model",
        "modeling_chatglm.py",
        "tokenization_chatglm.py",
        "README.md",
        "notes.txt",
    ):
        (source / name).write_text(name)
    target = export(source, tmp_path / "out", gather(source, 1), source=source)
    copied = {path.name for path in target.iterdir()}
    assert {
        "tokenizer.model",
        "modeling_chatglm.py",
        "tokenization_chatglm.py",
        "generation_config.json",
    } < copied
    assert not {"notes.txt", "README.md"} & copied
    assert (target / "tokenizer.model").read_text() == "tokenizer.model"


def scalar_head(tp_size, family):
    torch.manual_seed(1)
    weight, bias = torch.randn(1, 48), torch.randn(1)
    head = {"value_head.weight": [weight] * tp_size}
    return head | ({"value_head.bias": [bias] * tp_size} if family == "chatglm" else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_critic_goes_out_and_in(folders, tmp_path, family):
    gathered = gather(folders[family], 2, role="critic") | scalar_head(2, family)
    target = export(
        folders[family],
        tmp_path / "out",
        gathered,
        2,
        dtype=torch.bfloat16,
        role="critic",
        source=folders[family],
    )
    stored = load_all(target)
    head = "classifier_head" if family == "chatglm" else "score"
    assert torch.equal(stored[f"{head}.weight"], scalar_head(1, family)["value_head.weight"][0]), (
        "float32 beside bfloat16"
    )
    assert not any("lm_head" in name or "output_layer" in name for name in stored)
    config = read_config(target)
    back = iterate_shard(target, config, tp_rank=0, tp_size=1, layers=[], has_embedding=False, role="reward")
    assert back.missing == ()
    assert (f"{head}.bias" in stored) == (family == "chatglm")
    for name, (value,) in scalar_head(1, family).items():
        assert torch.equal(dict(back)[name], value)


def test_transformers_scores_with_an_exported_reward_model(folders, tmp_path):
    gathered = gather(folders["glm"], 1, role="reward") | scalar_head(1, "glm")
    target = export(folders["glm"], tmp_path / "out", gathered, role="reward", source=folders["glm"])
    hf_model = GlmForSequenceClassification.from_pretrained(target).eval()
    assert hf_model.num_labels == 1
    assert json.loads((target / "config.json").read_text())["architectures"] == [
        "GlmForSequenceClassification"
    ]
    tokens = torch.randint(3, 96, (1, 12))
    hidden = make_model("glm").model(tokens).last_hidden_state[0, -1]
    ((weight,),) = scalar_head(1, "glm").values()
    # float32, the order of summation differs
    assert torch.allclose(hf_model(tokens).logits[0, 0], hidden @ weight[0], atol=1e-5)


def test_copies_that_differ_are_named_and_the_first_one_counts(folders, tmp_path):
    gathered = gather(folders["glm"], 4)
    name = "decoder.layers.1.self_attention.linear_kv.weight"
    gathered[name][1] += 0.5
    gathered["decoder.final_layernorm.weight"][3] += 0.25
    with pytest.warns(UserWarning, match="is replicated") as caught:
        export(folders["glm"], tmp_path / "out", gathered, 4)
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 3  # the key head and the value head, and the norm
    assert (
        "final_layernorm.weight is replicated, and its copy on tensor-parallel rank 3 differs" in messages[0]
    )
    assert all(f"{name} is replicated, and its copy on tensor-parallel rank 1" in m for m in messages[1:])
    assert "by up to 0.5; the first is exported" in messages[1]
    assert_same_bytes(load_all(tmp_path / "out"), load_all(folders["glm"]))


def drop(gathered, name):
    return {key: value for key, value in gathered.items() if key != name}


BAD = {
    "missing": (
        lambda g: drop(g, "output_layer.weight"),
        "1 parameters were not given .* first output_layer.weight",
    ),
    "unknown": (lambda g: g | {"adapter.weight": [torch.ones(1)] * 2}, "adapter.weight is not a parameter"),
    "shape": (
        lambda g: g | {"decoder.final_layernorm.weight": [torch.ones(47)] * 2},
        r"final_layernorm\.weight has the shape \[47\], required is \[48\]",
    ),
    "ranks": (
        lambda g: g | {"decoder.final_layernorm.weight": [torch.ones(48)]},
        r"final_layernorm\.weight came as 1 tensors; 2 are required",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_parameters_are_refused_and_leave_nothing(folders, tmp_path, case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        export(folders["glm"], tmp_path / "out", change(gather(folders["glm"], 2)), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_that_comes_twice_is_refused(folders, tmp_path):
    gathered = gather(folders["glm"], 1)
    twice = [*gathered.items(), *gathered.items()]
    with pytest.raises(ValueError, match="or it was given before"):
        export_tensors(tmp_path / "out", read_config(folders["glm"]), twice, tp_size=1, dtype=torch.float32)


def test_a_type_that_is_too_narrow_is_refused(folders, tmp_path):
    gathered = gather(folders["glm"], 1)
    gathered["output_layer.weight"][0][3, 4] = 1e5
    with pytest.raises(ValueError, match=r"1 values of lm_head\.weight do not fit torch\.float16"):
        export(folders["glm"], tmp_path / "out", gathered, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"cannot be stored as torch\.int32"):
        export(folders["glm"], tmp_path / "out", gathered, dtype=torch.int32)
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_is_stored_once(tmp_path):
    source = save_folder(tmp_path / "tied", "glm", make_model("glm", tie_word_embeddings=True))
    gathered = gather(source, 2)
    gathered["output_layer.weight"] = gathered["embedding.word_embeddings.weight"]  # the last stage's copy
    export(source, tmp_path / "out", gathered, 2, source=source)
    assert_same_bytes(load_all(tmp_path / "out"), load_all(source))


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_stages_write_their_own_files_together(folders, tmp_path, family):
    source, config = folders[family], read_config(folders[family])
    gathered, barrier = gather(source, 2), threading.Barrier(2, timeout=120)
    errors = []

    def stage(rank):
        # two chunks a stage, interleaved
        writers = Writers(rank=rank, count=2, barrier=barrier.wait, writer_of_layer=[0, 1, 0, 1])
        own = {name: t for name, t in gathered.items() if writer_of(name, config, writers) == rank}
        try:
            export(source, tmp_path / "out", own, 2, source=source, writers=writers)
        except BaseException as error:
            errors.append(error)
            barrier.abort()
            raise

    threads = [threading.Thread(target=stage, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert_same_bytes(load_all(tmp_path / "out"), load_all(source))
