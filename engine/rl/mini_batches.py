"""An iteration's experience, cut in mini-batches, and what the roles in training do with one of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from glm_rlhf.engine.rl.algorithm import Algorithm
from glm_rlhf.engine.scoring.packed_batches import PackedBatch, batches_of_rollouts
from glm_rlhf.engine.training.loss import Learner, LossTerm
from glm_rlhf.engine.types import Experience
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.nonfinite import abbreviate
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The sequences of one optimizer step on this rank."""

    batches: tuple[PackedBatch, ...]
    """Their micro-batches, with the streams of all losses; none where this rank has no sequence in the
    step."""
    num_actions: float
    """Trained tokens of the step over all data-parallel ranks: the losses' denominator."""


def mini_batches(
    experience: Experience, algorithm: Algorithm, *, micro_batch_tokens: int, seed: int, topology: Topology
) -> list[MiniBatch]:
    """Return one epoch's mini-batches: all ranks' sequences in random order, cut in even parts.

    Which sequences form a mini-batch follows from the seed, not from the layout; a rank has those of its
    share. Every rank of the topology calls this: the data-parallel group sums the denominators.

    Args:
        experience: of this rank's share.
        algorithm: gives the streams and the number of mini-batches.
        micro_batch_tokens: most tokens of a micro-batch.
        seed: of the order.
        topology: layout and groups.
    """
    rollouts, num_parts = experience.rollouts, algorithm.section.minibatches
    generator = torch.Generator().manual_seed(seed)
    position = torch.randperm(rollouts.num_global, generator=generator).tolist()
    streams = algorithm.streams(experience)
    parts, sizes = [], []
    for part in range(num_parts):
        batches = batches_of_rollouts(
            rollouts,
            [n for n, index in enumerate(rollouts.indices) if position[index] % num_parts == part],
            max_tokens=micro_batch_tokens,
            topology=topology,
            streams=streams,
        )
        parts.append(tuple(batches))
        sizes.append(sum(int(batch.streams["mask"].sum()) for batch in batches))
    totals = torch.tensor(sizes, dtype=torch.float64, device=topology.device)
    dist.all_reduce(totals, group=topology.dp_group)
    return [
        MiniBatch(batches=part, num_actions=max(total, 1.0))
        for part, total in zip(parts, totals.tolist(), strict=True)
    ]


def learners(
    states: Mapping[str, AnyTrainingState],
    experience: Experience,
    mini_batch: MiniBatch,
    algorithm: Algorithm,
    *,
    roles: Collection[str] | None = None,
    demonstrations: LossTerm | None = None,
) -> dict[str, Learner]:
    """Return each role's part in an optimizer step, by role, in the order of `Needs.trains`.

    All losses are divided by the action tokens of the mini-batch over all data-parallel ranks. The policy's
    has the loss on demonstrations as a second term: micro-batches of both go through one pipeline schedule
    into one gradient, which is reduced and clipped once.

    Args:
        states: the models in training, by role.
        experience: of this rank's share.
        mini_batch: of it.
        algorithm: gives the losses.
        roles: those that learn in this step; None for all.
        demonstrations: the step's demonstrations; None for none.
    """
    rollouts, losses = experience.rollouts, algorithm.losses(experience)
    found = {}
    for role in algorithm.needs().trains:
        if roles is not None and role not in roles:
            continue
        term = LossTerm(
            loss=losses[role],
            batches=mini_batch.batches,
            denominator=mini_batch.num_actions,
            name_items=lambda items: f"answers {abbreviate([rollouts.indices[item] for item in items])}",
        )
        terms = (term, demonstrations) if role == "policy" and demonstrations is not None else (term,)
        found[role] = Learner(role=role, state=states[role], terms=terms)
    return found
