"""The sharded GLM equals transformers: logprobs, gradients and one optimizer step, in every layout."""

from pathlib import Path

import pytest
import torch
from layout_params import layout_params
from tiny_models import FAMILIES, in_family, make_model, reference_gradients, reference_logprobs, save_folder

from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.model.token_outputs import next_tokens, token_logprobs
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.pipeline.scoring import score_tokens
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.sharding import place_shard, shards_of
from glm_rlhf.parallel.spec.weight_map import weights_of
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.load import load_weights

LENGTHS = [(5, 1, 9), (17,), (3, 12, 2), (6, 7)]

# Over four ranks; the other ranks are data parallel.
LAYOUTS = {
    "dp4": {},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "tp2 sp": {"tp": 2, "sequence_parallel": True},
    "tp4 sp": {"tp": 4, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp2 pp2 sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "tp2 pp2 vpp2 sp": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "tp2 cp2 sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "pp2 cp2": {"pp": 2, "cp": 2},
}


def sequences():
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(0, 96, (n,), generator=generator) for n in lengths] for lengths in LENGTHS]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One folder a family, with transformers' answers beside it."""
    folders = {}
    flat = [sequence for batch in sequences() for sequence in batch]
    for family in FAMILIES:
        model = make_model(family)
        folder = save_folder(tmp_path_factory.mktemp(family), family, model)
        loss, gradients = reference_gradients(model, flat)
        answers = {
            "logprobs": [chosen.detach() for chosen in reference_logprobs(model, flat)],
            "loss": loss,
            "gradients": in_family(family, gradients),
        }
        torch.save(answers, folder / "answers.pt")
        folders[family] = folder
    return folders


def check_layout(folders: dict[str, Path], axes: dict) -> dict[str, dict[str, float]]:
    """On each rank, by family: how far this layout is from transformers."""
    with open_topology(Layout(**axes)) as topology:
        return {family: differences(folder, topology) for family, folder in folders.items()}


def differences(folder: Path, topology) -> dict[str, float]:
    answers = torch.load(folder / "answers.pt")
    chunks = build_model(read_config(folder), topology, dtype=torch.float32)
    load_weights(chunks, folder)
    batches = [pack(batch, multiple=topology.layout.token_multiple) for batch in sequences()]
    logprobs = [found for found, _ in score_tokens(chunks, batches, topology=topology)]
    split = [part for batch, rows in zip(batches, logprobs, strict=True) for part in batch.split(rows)]

    # With these settings Adam's first step is g / (|g| + 1): the gradient can be read off the weights.
    settings = AdamSettings(lr=1.0, betas=(0.0, 0.0), epsilon=1.0, clip_grad=0.0)
    state = TrainingState(chunks, settings, topology=topology)
    before = {name: p.detach().clone() for chunk in chunks for name, p in chunk.named_weights()}
    loss = train_step(state, batches, topology)
    result = state.step()
    assert result.is_applied
    steps = {n: before[n] - p.detach() for chunk in chunks for n, p in chunk.named_weights()}
    gradients = {name: step / (1 - step.abs()) for name, step in steps.items()}
    norm = torch.stack([g.square().sum() for g in answers["gradients"].values()]).sum().sqrt().item()
    return {
        "logprob": max(float((a - b).abs().max()) for a, b in zip(split, answers["logprobs"], strict=True)),
        "loss": abs(loss - answers["loss"]),
        "norm": abs(result.grad_norm - norm) / norm,
        "gradient": gradient_error(gradients, answers["gradients"], chunks),
    }


def own_rows(values_T, batch, topology):
    return share(batch, cp_rank=topology.cp_rank, cp_size=topology.layout.cp).take(values_T)


def train_step(state, batches, topology) -> float:
    """Run this data-parallel rank's micro-batches forward and backward; return the loss of all."""
    num_targets = sum(length - 1 for lengths in LENGTHS for length in lengths)
    mine = batches[topology.dp_rank :: topology.dp]
    targets = [next_tokens(batch) for batch in mine]

    def step(model, hidden_TD, index):
        logprobs_T, _ = token_logprobs(model, hidden_TD, own_rows(targets[index], mine[index], topology))
        loss = -logprobs_T.sum() / num_targets
        return loss, loss.detach()

    state.zero_grad()
    outputs = run_micro_batches(state.chunks, mine, step, topology=topology, forward_only=False)
    total = torch.stack([*outputs, torch.zeros(())]).sum()
    torch.distributed.all_reduce(total)
    return total.item() / topology.layout.tp


def gradient_error(gradients, expected, chunks) -> float:
    """Worst difference of any weight's gradient, relative to the largest of that weight."""
    worst, seen = 0.0, 0
    for chunk in chunks:
        glm, topology = chunk.glm, chunk.topology
        layers = range(chunk.first_layer, chunk.first_layer + len(chunk.decoder.layers))
        weights = weights_of(
            glm, layers=layers, has_embedding=chunk.pre_process, has_head=chunk.post_process, role="policy"
        )
        for weight in weights:
            for shard in shards_of(weight, glm, tp_rank=topology.tp_rank, tp_size=topology.layout.tp):
                for piece, part in place_shard(shard, gradients[shard.name]):
                    whole = expected[piece.name]
                    want = whole.narrow(piece.dim, piece.start, piece.length)
                    worst = max(worst, float((part - want).abs().max() / whole.abs().max()))
                    seen += 1
    assert seen
    return worst


@pytest.mark.parametrize(
    "axes", layout_params(LAYOUTS, quick=("dp4", "tp4 sp", "tp2 pp2 vpp2 sp", "tp2 cp2 sp", "pp2 cp2"))
)
def test_every_layout_equals_transformers(ranks, checkpoints, axes):
    for answers in ranks.run(check_layout, checkpoints, axes):
        assert answers.keys() == set(FAMILIES)
        for family, errors in answers.items():
            # fp32, sums of some dozen products in another order: about 1e-6; a wrong shard gives 1e-1.
            assert errors["logprob"] <= 2e-5, (family, errors)
            assert errors["loss"] <= 1e-5, (family, errors)
            assert errors["norm"] <= 1e-5, (family, errors)
            assert errors["gradient"] <= 1e-4, (family, errors)
