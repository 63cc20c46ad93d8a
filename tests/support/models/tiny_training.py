"""Training steps of a tiny sharded model, and its weights assembled from all ranks."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from glm_rlhf.parallel.model.glm import SCALAR_ROLES, build_model
from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.model.token_outputs import next_tokens, token_logprobs, token_values
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.pipeline.schedule import collect_rows, run_micro_batches
from glm_rlhf.parallel.pipeline.scoring import score_tokens
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.sharding import place_shard, shards_of
from glm_rlhf.parallel.spec.weight_map import weights_of
from glm_rlhf.parallel.weights.load import randomize_weights

CONFIG = GLMConfig(
    family="glm",
    num_layers=4,
    hidden_size=32,
    num_heads=8,
    num_kv_heads=2,
    head_size=8,
    ffn_size=48,
    vocab_size=64,
    norm_epsilon=1e-5,
    rope_theta=1e4,
    max_positions=256,
    init_std=0.15,
)
LENGTHS = ((5, 1, 9), (17,), (3, 12, 2), (6, 7))

# Adam's first step under these settings is g / (|g| + 1), so that the gradient can be read off the weights.
READS_GRADIENT = AdamSettings(lr=1.0, betas=(0.0, 0.0), epsilon=1.0, clip_grad=0.0)
# Several steps of about the gradient's size: roundings of it stay roundings of the weights.
SMALL_STEPS = AdamSettings(lr=0.1, betas=(0.0, 0.0), epsilon=1.0, clip_grad=0.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, its data and its training settings."""

    role: str = "policy"
    lengths: tuple[tuple[int, ...], ...] = LENGTHS
    """Tokens of each sequence of each micro-batch of the whole run."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields that differ from `CONFIG`."""
    dtype: torch.dtype = torch.float32
    settings: AdamSettings = READS_GRADIENT
    num_steps: int = 1
    overlaps: bool = False
    in_backward: bool = False
    recomputes: bool = False
    frozen: tuple[str, ...] = ()
    """Weights whose names have one of these prefixes are frozen."""

    @property
    def config(self) -> GLMConfig:
        return replace(CONFIG, **self.changes)


def run_cases(axes: dict[str, Any], cases: list[Case]) -> list[dict[str, Any]]:
    """On each rank: what `run_case` gives for each case, in one topology."""
    with open_topology(Layout(**axes)) as topology:
        return [run_case(case, topology) for case in cases]


def run_case(case: Case, topology) -> dict[str, Any]:
    """Return forward results, losses, gradient norms, and the pieces of the weights' change on this rank."""
    chunks = make_chunks(case, topology)
    batches = make_batches(case, topology)
    outputs = forward(case, chunks, batches, topology)
    state = training_state(
        chunks,
        case.settings,
        topology=topology,
        overlap_communication=case.overlaps,
        in_backward=case.in_backward,
    )
    before = {name: p.detach().clone() for chunk in chunks for name, p in chunk.named_weights()}
    mine = batches[topology.dp_rank :: topology.dp]
    losses, norms = [], []
    for _ in range(case.num_steps):
        losses.append(train_step(case, state, mine, topology))
        result = state.step()
        assert result.is_applied
        norms.append(result.grad_norm)
    state.gather_weights()
    steps = {n: before[n].float() - p.detach().float() for c in chunks for n, p in c.named_weights()}
    pieces = pieces_of(chunks, steps)
    return {"outputs": outputs, "losses": losses, "norms": norms, "pieces": pieces}


def make_chunks(case: Case, topology, seed: int = 7):
    chunks = build_model(
        case.config, topology, role=case.role, dtype=case.dtype, recompute_layers=case.recomputes
    )
    randomize_weights(chunks, seed=seed)
    for chunk in chunks:
        for name, parameter in chunk.named_weights():
            parameter.requires_grad_(not (case.frozen and name.startswith(case.frozen)))
    return chunks


def make_batches(case: Case, topology):
    """Every micro-batch of the run, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    sequences = [
        [torch.randint(0, case.config.vocab_size, (n,), generator=generator) for n in lengths]
        for lengths in case.lengths
    ]
    return [pack(batch, multiple=topology.layout.token_multiple) for batch in sequences]


def forward(case: Case, chunks, batches, topology) -> list[torch.Tensor]:
    """Logprobs or values of every sequence, on every rank."""
    if case.role not in SCALAR_ROLES:
        found = [rows for rows, _ in score_tokens(chunks, batches, topology=topology)]
    else:
        outputs = run_micro_batches(
            chunks,
            batches,
            lambda model, hidden_TD, _: (None, token_values(model, hidden_TD).unsqueeze(1)),
            topology=topology,
            forward_only=True,
        )
        found = [rows.squeeze(1) for rows in collect_rows(outputs, batches, 1, topology=topology)]
    return [part for batch, rows in zip(batches, found, strict=True) for part in batch.split(rows)]


def train_step(case: Case, state, mine, topology) -> float:
    """Forward and backward of this data-parallel rank's micro-batches; the loss of all of them."""
    state.zero_grad()
    losses = run_micro_batches(
        state.chunks,
        mine,
        lambda model, hidden_TD, index: loss_of(case, model, hidden_TD, mine[index]),
        topology=topology,
        forward_only=False,
    )
    total = torch.stack([*losses, torch.zeros(())]).sum()
    torch.distributed.all_reduce(total)
    return total.item() / topology.layout.tp


def loss_of(case: Case, model, hidden_TD, batch):
    """This rank's part of the loss: next tokens, a regression of values, or signs of last tokens' scores."""
    topology = model.topology
    mine = share(batch, cp_rank=topology.cp_rank, cp_size=topology.layout.cp)
    if case.role == "policy":
        num_targets = sum(length - 1 for lengths in case.lengths for length in lengths)
        logprobs_T, _ = token_logprobs(model, hidden_TD, mine.take(next_tokens(batch)))
        loss = -logprobs_T.sum() / num_targets
    elif case.role == "critic":
        is_real_T = torch.arange(batch.num_tokens) < batch.num_tokens - batch.num_padding
        error_T = token_values(model, hidden_TD) - mine.take(batch.tokens_T.float().sin())
        loss = 0.5 * (error_T.square() * mine.take(is_real_T)).sum() / sum(map(sum, case.lengths))
    else:
        sign_T = torch.zeros(batch.num_tokens)
        ends = [end - 1 for end in batch.boundaries[1:]]
        sign_T[ends] = torch.where(batch.tokens_T[ends] % 2 == 0, 1.0, -1.0)
        sign_T = mine.take(sign_T)
        margin_T = sign_T * token_values(model, hidden_TD)
        loss = (torch.nn.functional.softplus(-margin_T) * sign_T.abs()).sum() / sum(map(len, case.lengths))
    return loss, loss.detach()


def pieces_of(chunks, tensors: dict[str, torch.Tensor]) -> list[tuple[str, int, int, torch.Tensor]]:
    """Parts of the whole model's tensors, (Hugging Face name, dim, start, part), in this rank's `tensors`."""
    pieces = []
    for chunk in chunks:
        topology = chunk.topology
        weights = weights_of(
            chunk.glm,
            layers=range(chunk.first_layer, chunk.first_layer + len(chunk.decoder.layers)),
            has_embedding=chunk.pre_process,
            has_head=chunk.post_process,
            role=chunk.role,
        )
        for weight in weights:
            for shard in shards_of(weight, chunk.glm, tp_rank=topology.tp_rank, tp_size=topology.layout.tp):
                for piece, part in place_shard(shard, tensors[shard.name]):
                    pieces.append((piece.name, piece.dim, piece.start, part.clone()))
    return pieces


def assemble(pieces_by_rank) -> tuple[dict[str, torch.Tensor], float]:
    """Whole tensors by name, and the largest difference between copies of the same element."""
    parts: dict[str, list] = {}
    for pieces in pieces_by_rank:
        for name, dim, start, part in pieces:
            parts.setdefault(name, []).append((dim, start, part))
    whole, disagreement = {}, 0.0
    for name, found in parts.items():
        dim = found[0][0]
        shape = list(found[0][2].shape)
        shape[dim] = max(start + part.shape[dim] for _, start, part in found)
        tensor = torch.full(shape, torch.nan)
        for _, start, part in found:
            place = tensor.narrow(dim, start, part.shape[dim])
            difference = (place - part).abs().nan_to_num(0.0)  # NaN where no part was copied yet
            disagreement = max(disagreement, float(difference.max()))
            place.copy_(part)
        assert not tensor.isnan().any(), name
        whole[name] = tensor
    return whole, disagreement


def gradients(steps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradient behind one step of `READS_GRADIENT`."""
    return {name: step / (1 - step.abs()) for name, step in steps.items()}


def worst_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor's elements, relative to the largest of that tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-30))
        for name, whole in expected.items()
    )


def differences(found: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    """Distance of all ranks' results of one case (`READS_GRADIENT`, one step) from another layout's."""
    (whole, copies), (wanted, _) = (assemble([r["pieces"] for r in ranks]) for ranks in (found, [expected]))
    outputs = [zip(rank["outputs"], expected["outputs"], strict=True) for rank in found]
    return {
        "output": max(float((a - b).abs().max()) for pairs in outputs for a, b in pairs),
        "loss": max(abs(rank["losses"][0] - expected["losses"][0]) for rank in found),
        "norm": max(abs(rank["norms"][0] / expected["norms"][0] - 1) for rank in found),
        "gradient": worst_difference(gradients(whole), gradients(wanted)),
        "copies": copies,
    }


def assert_same_training(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Check that several `SMALL_STEPS` of a case equal one rank on all ranks of a layout, in fp32."""
    assert len(expected["losses"]) > 1
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)  # fp32 in another order
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    (whole, copies), (wanted, _) = (assemble([r["pieces"] for r in ranks]) for ranks in (found, [expected]))
    assert copies == 0
    # Relative to a weight's largest change; each step adds the rounding of the one before.
    assert worst_difference(whole, wanted) <= 1e-3


def assert_equal(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Check that a case equals one rank on all ranks of a layout, in fp32."""
    far = differences(found, expected)
    # Sums of some dozen fp32 products in another order, about 1e-6; a wrong shard or sum gives 1e-1.
    assert far["output"] <= 1e-5, far
    assert far["loss"] <= 1e-5, far
    assert far["norm"] <= 1e-5, far
    # Relative to a tensor's largest gradient, and read off weights: their rounding is 1e-5 of small ones.
    assert far["gradient"] <= 2e-4, far
    assert far["copies"] == 0, far  # data-parallel copies, replicated weights and a tied head stay the same
