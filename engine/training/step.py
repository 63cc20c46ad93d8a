"""One optimizer step: micro-batches forward and backward, then the weights, or nothing at all."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from glm_rlhf.engine.scoring.record_batches import MicroBatch
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.pipeline.oom_retry import run_with_oom_retry
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.nonfinite import abbreviate, gather_findings
from glm_rlhf.parallel.runtime.topology import Topology


class Objective(Protocol):
    """What a stage minimises, and what it tells about it. Everything it counts adds up over micro-batches."""

    prefix: str
    """First part of its metrics' names in training, such as `actor`."""
    sum_names: tuple[str, ...]
    """Names of the numbers that `loss` counts; the first is `loss`."""

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return what the sum over these records is divided by, the same on every rank."""

    def loss(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: MicroBatch, denominator: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (this rank's part of the loss, fp64 sums in the order of `sum_names`).

        Called on the last stage by all its tensor- and context-parallel ranks. The sums of the first
        tensor-parallel rank count, added over context- and data-parallel ranks.
        """

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return what is told, by name without prefix; None where it is not defined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What became of one step; the same on every rank, but for the records."""

    sums: dict[str, float]
    """The objective's sums over all ranks."""
    grad_norm: float
    """Norm of the gradient over the whole model before clipping; NaN when the loss was not finite."""
    is_applied: bool
    """Whether the weights changed: the loss and the gradient were finite."""
    nonfinite_records: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(rank, record numbers) of each micro-batch whose loss was not finite, over all ranks."""
    where: str = ""
    """Ranks and weights whose gradient was not finite; empty where it was, or where it is not known."""


def update(
    state: AnyTrainingState,
    objective: Objective,
    batches: Sequence[MicroBatch],
    denominator: float,
    *,
    topology: Topology,
    name: Callable[[int], str],
) -> UpdateResult:
    """Return what one step did; every rank calls this together.

    A loss or a gradient that is not finite leaves the weights and the optimizer as they were, on all ranks:
    the decision is taken from numbers that were added up over the world. An optimizer in backward cannot
    take back what changed before a gradient was not finite, see `InBackwardState`.

    Args:
        state: model and optimizer, their learning rate set.
        objective: the loss.
        batches: this data-parallel rank's, perhaps none.
        denominator: of the whole step.
        topology: layout and groups.
        name: of a record, for messages.

    Raises:
        ValueError: there is no memory for a single record; on every rank. Where there is none for several,
            their micro-batch is split, and the step begins again: its gradient is the same.
    """

    def begin(batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        state.zero_grad()
        return _run(state.chunks, objective, batches, denominator, topology, forward_only=False)

    outputs, batches = _fitted(begin, state.chunks, batches, topology, name, forward_only=False)
    sums = _total(outputs, objective, topology)
    if not math.isfinite(sums["loss"]):
        nonfinite_records = _find_culprits(outputs, batches, topology)
        return UpdateResult(
            sums=sums, grad_norm=math.nan, is_applied=False, nonfinite_records=nonfinite_records
        )
    result = state.step()
    where = ""
    if not result.is_applied:
        names = state.nonfinite_gradients()
        where = gather_findings([f"in {abbreviate(names)}"] if names else [])
    return UpdateResult(sums=sums, grad_norm=result.grad_norm, is_applied=result.is_applied, where=where)


def evaluate(
    chunks: Sequence[torch.nn.Module],
    objective: Objective,
    batches: Sequence[MicroBatch],
    denominator: float,
    *,
    topology: Topology,
    name: Callable[[int], str],
) -> dict[str, float]:
    """Return the objective's sums over all ranks, without gradients; every rank calls this together.

    Raises:
        ValueError: there is no memory for a single record.
    """

    def run(batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return _run(chunks, objective, batches, denominator, topology, forward_only=True)

    outputs, _ = _fitted(run, chunks, batches, topology, name, forward_only=True)
    return _total(outputs, objective, topology)


def _fitted(
    run: Callable[[Sequence[MicroBatch]], list[torch.Tensor]],
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    topology: Topology,
    name: Callable[[int], str],
    *,
    forward_only: bool,
) -> tuple[list[torch.Tensor], list[MicroBatch]]:
    return run_with_oom_retry(
        run,
        batches,
        lambda batch: name(batch.records[0]),
        models=[chunks],
        topology=topology,
        forward_only=forward_only,
    )


def _run(
    chunks: Sequence[torch.nn.Module],
    objective: Objective,
    batches: Sequence[MicroBatch],
    denominator: float,
    topology: Topology,
    *,
    forward_only: bool,
) -> list[torch.Tensor]:
    """Return the sums of each micro-batch on the last stage; elsewhere nothing."""
    outputs = run_micro_batches(
        chunks,
        [batch.packed for batch in batches],
        _step(objective, batches, denominator),
        topology=topology,
        forward_only=forward_only,
    )
    return list(outputs) if topology.is_last_stage else []


def _step(
    objective: Objective, batches: Sequence[MicroBatch], denominator: float
) -> Callable[[GLMModel, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    def step(model: GLMModel, hidden_TD: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return objective.loss(model, hidden_TD, batches[index], denominator)

    return step


def _total(outputs: Sequence[torch.Tensor], objective: Objective, topology: Topology) -> dict[str, float]:
    """Add up over micro-batches and ranks: one all-reduce of the world."""
    sums_K = torch.zeros(len(objective.sum_names), dtype=torch.float64, device=topology.device)
    if topology.tp_rank == 0:
        for output in outputs:
            sums_K += output
    dist.all_reduce(sums_K)
    return dict(zip(objective.sum_names, sums_K.tolist(), strict=True))


def _find_culprits(
    outputs: Sequence[torch.Tensor], batches: Sequence[MicroBatch], topology: Topology
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Gather from all ranks which of their micro-batches had a loss that is not finite."""
    mine = [
        (topology.rank, batch.records)
        for output, batch in zip(outputs, batches if outputs else (), strict=True)
        if topology.tp_rank == 0 and not math.isfinite(output[0].item())
    ]
    everyone: list[list] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(everyone, mine)
    return tuple(found for part in everyone for found in part)
