"""Generation on the training weights: groups of sequences rotate through the pipeline stages.

Every rank of a pipeline runs the same queue, so all make the same schedule without communication. With
several stages the sequences form at least as many groups, and each stage works on another group: while
the last stage samples tokens for one, the first embeds the tokens of the next.

A step takes a group through all stages (each stage's chunks one after another). A round is one step per
group; within a round a stage computes chunk 0 of every group, then chunk 1 of every group. All ranks call
the queue in the same order: for each group g, take(g) with the samples of its last step, then next(g).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from glm_rlhf.parallel.inference.stage import GenerationStage, InFlightStep
from glm_rlhf.parallel.inference.step_plan import StepPlan
from glm_rlhf.parallel.runtime.preemption import Preempted, preemption_requested
from glm_rlhf.parallel.runtime.spans import heartbeat, span

_ROUNDS_PER_PREEMPTION_CHECK = 16
Done = TypeVar("Done", covariant=True)


class Queue(Protocol, Generic[Done]):
    """The schedule of generation steps; `GenerationQueue` of the engine."""

    def next(self, group: int) -> StepPlan | None:
        """Return the next step of a group; None if it has nothing to do."""

    def take(
        self,
        group: int,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        untempered_logprobs: Sequence[float],
    ) -> list[Done]:
        """Take the samples of a group's last step and return the sequences that it completed.

        Raises:
            FloatingPointError: a token is -1: the logits of its sequence are not finite.
        """

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is complete."""


@dataclass(slots=True, kw_only=True)
class TickCount:
    """Number of steps of all groups with and without work, while any sequence was unfinished."""

    busy: int = 0
    """Steps with rows to compute."""
    idle: int = 0
    """Steps without rows."""

    @property
    def idle_fraction(self) -> float:
        """Fraction of steps without work; 0 before the first."""
        return self.idle / max(1, self.busy + self.idle)


def run_queue(
    stage: GenerationStage,
    queue: Queue[Done],
    *,
    num_groups: int,
    ticks: TickCount | None = None,
    when_idle: Callable[[], None] | None = None,
) -> Iterator[Done]:
    """Yield sequences as they complete, until the queue is finished; the same on every rank.

    The pipeline and tensor-parallel groups communicate: all their ranks iterate to the end, over equal
    queues. Data- and context-parallel ranks are independent.

    Args:
        stage: this rank's part of the model, over the cache whose pages the queue allocates.
        queue: the schedule.
        num_groups: groups of the queue, at least the number of stages.
        ticks: updated with each step.
        when_idle: called before a round for each step of the previous round without work, on all ranks of
            both groups. It may communicate in these groups: completed sequences have been yielded, and no
            hidden state is in flight.

    Raises:
        ValueError: fewer groups than stages.
        FloatingPointError: of `queue.take`, where no token could be sampled; on all ranks of both groups.
        Preempted: a rank received a preemption signal; on all ranks of both groups.
    """
    num_stages = stage.topology.layout.pp
    if num_groups < num_stages:
        raise ValueError(
            f"{num_groups} groups for {num_stages} stages: some stage would always wait; give at least "
            f"{num_stages} groups"
        )
    ticks = TickCount() if ticks is None else ticks
    running: list[InFlightStep | None] = [None] * num_groups
    topology, num_rounds, num_idle = stage.topology, 0, 0
    while not queue.is_finished:
        heartbeat()
        num_rounds += 1
        if num_rounds % _ROUNDS_PER_PREEMPTION_CHECK == 0 and preemption_requested(
            (topology.tp_group, topology.device), (topology.pp_host_group, torch.device("cpu"))
        ):
            _finish_steps(stage, [], running)
            raise Preempted
        for _ in range(num_idle if when_idle is not None else 0):
            when_idle()
        num_idle = 0
        for group in range(num_groups):
            finished, running[group] = running[group], None
            if finished is not None:
                try:
                    yield from queue.take(group, *stage.sampled(finished))
                except BaseException:
                    # All ranks are here: messages in flight must not reach the next run.
                    _finish_steps(stage, running[:group], running[group:])
                    raise
            plan = queue.next(group)
            ticks.busy += plan is not None
            ticks.idle += plan is None
            num_idle += plan is None
            if plan is not None:
                with span("token step"):
                    running[group] = stage.start(plan)
                    stage.advance(running[group], 0)
        _advance_further(stage, running)
    stage.finish()


def _advance_further(stage: GenerationStage, steps: Sequence[InFlightStep | None]) -> None:
    """Run all chunks after the first of every step."""
    for chunk in range(1, stage.num_chunks):
        for step in steps:
            if step is not None:
                with span("token step"):
                    stage.advance(step, chunk)


def _finish_steps(
    stage: GenerationStage, begun: Sequence[InFlightStep | None], computed: Sequence[InFlightStep | None]
) -> None:
    """Complete all steps and discard their samples: those begun in this round, and those of the last one."""
    _advance_further(stage, begun)
    for step in (*computed, *begun):
        if step is not None:
            stage.sampled(step)
    stage.finish()
