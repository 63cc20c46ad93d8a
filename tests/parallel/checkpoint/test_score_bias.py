"""A `score.bias`, which transformers' reward models lack: kept where a folder holds it, and never trained."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_model, save_folder
from tiny_training import Case, make_batches, make_chunks, train_step
from weight_folders import load_all

from glm_rlhf.parallel.checkpoint.restore import checkpoint_at, restore
from glm_rlhf.parallel.checkpoint.save import CheckpointWriter
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.storage.checkpoint_manifest import FILE_NAME, manifest_bytes, read_manifest
from glm_rlhf.parallel.weights.export import export_model
from glm_rlhf.parallel.weights.load import load_model

ADAM = AdamSettings(lr=1e-2, clip_grad=0.0)
BIAS = Case(role="critic", changes={"has_score_bias": True}, frozen=("value_head.bias",), settings=ADAM)
NO_BIAS = Case(role="critic", settings=ADAM)
LAYOUTS = [{}, {"tp": 2, "pp": 2}]
SLOW_LAYOUTS = [{"pp": 4}, {"tp": 4, "sequence_parallel": True}, {"pp": 2, "vpp": 2}]


@pytest.fixture
def folder(tmp_path):
    """A reward model of 4 layers whose folder holds a bias of 0.25, as versions before 0.2 wrote it."""
    model = make_model("glm", has_score=True)
    path = save_folder(tmp_path / "model", "glm", model)
    save_file(load_all(path) | {"score.bias": torch.tensor([0.25])}, path / "model.safetensors")
    return path


def bias_here(chunks) -> list[float]:
    return [chunk.value_head.bias.item() for chunk in chunks if chunk.post_process]


def trained_saved_and_exported(axes, folder, target, in_backward):
    """The bias on this rank as read, after a step, and as resumed."""
    with open_topology(Layout(**axes)) as topology:
        chunks, created = load_model(folder, topology, role="reward", dtype=torch.float32)
        assert created == ()
        found = [bias_here(chunks)]
        state = training_state(chunks, ADAM, topology=topology, in_backward=in_backward)
        before = [chunk.value_head.weight.detach().clone() for chunk in chunks if chunk.post_process]
        batches = make_batches(replace(NO_BIAS), topology)
        train_step(NO_BIAS, state, batches[topology.dp_rank :: topology.dp], topology)
        assert state.step().is_applied
        state.gather_weights()
        heads = [chunk.value_head.weight for chunk in chunks if chunk.post_process]
        assert all(not torch.equal(one, other) for one, other in zip(before, heads, strict=True))
        found.append(bias_here(chunks))
        with CheckpointWriter(target / "checkpoints", topology=topology, keep_last=2) as writer:
            writer.save(1, {"policy": state}, state={})
        export_model(chunks, target / "hf", topology=topology, source=folder)
        for chunk in chunks:
            if chunk.post_process:
                chunk.value_head.bias.data.zero_()
        restore(state, checkpoint_at(target / "checkpoints" / "step_1", topology=topology), "policy")
        found.append(bias_here(chunks))
        return found


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    "axes", [*LAYOUTS, *(pytest.param(axes, marks=pytest.mark.slow) for axes in SLOW_LAYOUTS)], ids=str
)
def test_it_is_read_kept_and_never_trained(ranks, folder, tmp_path, axes, in_backward):
    answers = ranks.run(trained_saved_and_exported, axes, folder, tmp_path, in_backward)
    assert any(found[0] for found in answers)
    for found in answers:
        assert found in ([[0.25]] * 3, [[]] * 3)
    assert load_all(tmp_path / "hf")["score.bias"].item() == 0.25
    with open_topology(Layout()) as topology:
        chunks, _ = load_model(tmp_path / "hf", topology, role="reward", dtype=torch.float32)
        assert bias_here(chunks) == [0.25]


def test_it_is_named_once(folder, capsys):
    with open_topology(Layout()) as topology:
        load_model(folder, topology, role="critic")
    assert capsys.readouterr().err.count("holds a score.bias: it stays in every score") == 1


def test_one_of_0_is_none(folder):
    save_file(load_all(folder) | {"score.bias": torch.zeros(1)}, folder / "model.safetensors")
    with open_topology(Layout()) as topology:
        chunks, _ = load_model(folder, topology, role="reward")
        assert chunks[0].value_head.bias is None
        assert not chunks[0].glm.has_score_bias


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_new_scalar_head_has_none(tmp_path, family):
    path = save_folder(tmp_path / "model", family, make_model(family))
    with open_topology(Layout()) as topology:
        chunks, created = load_model(path, topology, role="critic", dtype=torch.float32)
        assert created == ("value_head.weight",)
        assert [name for name, _ in chunks[0].value_head.named_parameters()] == ["weight"]


def test_one_of_another_shape_is_refused(folder):
    save_file(load_all(folder) | {"score.bias": torch.ones(2)}, folder / "model.safetensors")
    with open_topology(Layout()) as topology, pytest.raises(ValueError, match=r"'score\.bias' with 2 rows"):
        load_model(folder, topology, role="reward")


def save_as_before(case, folder, topology):
    """Write a checkpoint of a version before 0.2: the bias is trained, the manifest does not know of it."""
    state = training_state(make_chunks(case, topology), ADAM, topology=topology)
    train_step(case, state, make_batches(case, topology), topology)
    assert state.step().is_applied
    with CheckpointWriter(folder, topology=topology, keep_last=2, is_async=False) as writer:
        writer.save(1, {"policy": state}, state={})
    path = folder / "step_1" / FILE_NAME
    values = json.loads(path.read_bytes())
    del values["checksum"], values["models"]["policy"]["config"]["has_score_bias"]
    values["checksum"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values))


def test_a_checkpoint_with_its_moments_is_refused_by_name(tmp_path):
    with open_topology(Layout()) as topology:
        save_as_before(replace(BIAS, frozen=()), tmp_path, topology)
        assert read_manifest(tmp_path / "step_1").models["policy"].config.has_score_bias
        state = training_state(make_chunks(NO_BIAS, topology), ADAM, topology=topology)
        with pytest.raises(ValueError, match=r"value_head\.bias of policy with its moments: .* glm models"):
            restore(state, checkpoint_at(tmp_path / "step_1", topology=topology), "policy")


def test_the_manifest_of_a_policy_or_of_chatglm_is_read_as_before(tmp_path):
    with open_topology(Layout()) as topology:
        for number, case in enumerate((Case(settings=ADAM), replace(NO_BIAS, changes={"family": "chatglm"}))):
            save_as_before(case, tmp_path / str(number), topology)
            manifest = read_manifest(tmp_path / str(number) / "step_1")
            assert not manifest.models["policy"].config.has_score_bias
            assert (
                json.loads(manifest_bytes(manifest))["models"]["policy"]["config"]["has_score_bias"] is False
            )
            state = training_state(make_chunks(case, topology, seed=8), ADAM, topology=topology)
            restore(state, checkpoint_at(tmp_path / str(number) / "step_1", topology=topology), "policy")
