"""Generation on the training weights: groups of sequences rotate through the pipeline's stages.

Every rank of a pipeline replays the same queue, so all agree on who runs without being told. With
several stages the sequences form at least as many groups, and each stage works on another group: while
the last stage draws tokens for one, the first already embeds the next.

A turn is a group's passage through all stages (each stage's chunks one after the other). Turns come in
rounds of one a group; within a round a stage does chunk 0 of every group, then chunk 1 of every group.
The order of the queue's calls, the same everywhere: take(g) for what g drew in the last round, next(g).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from glm_rlhf.parallel.inference.stage import GenerationStage, InFlightStep
from glm_rlhf.parallel.inference.step_plan import StepPlan
from glm_rlhf.parallel.runtime.preemption import Preempted, preemption_requested
from glm_rlhf.parallel.runtime.spans import heartbeat, span

_ROUNDS_BETWEEN_WISHES = 16
Done = TypeVar("Done", covariant=True)


class Queue(Protocol, Generic[Done]):
    """Who runs next; `GenerationQueue` of the engine."""

    def next(self, group: int) -> StepPlan | None:
        """Return what a group does now, None when it has nothing to do."""

    def take(
        self,
        group: int,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        untempered_logprobs: Sequence[float],
    ) -> list[Done]:
        """Take what was drawn in a group's last step and return the sequences that it completed."""

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is complete."""


@dataclass(slots=True, kw_only=True)
class TickCount:
    """How often this stage had work when its turn came, while any sequence was unfinished."""

    busy: int = 0
    """Turns with rows to compute."""
    idle: int = 0
    """Turns without."""

    @property
    def idle_fraction(self) -> float:
        """Share of turns without work; 0 before the first."""
        return self.idle / max(1, self.busy + self.idle)


def run_queue(
    stage: GenerationStage,
    queue: Queue[Done],
    *,
    num_groups: int,
    ticks: TickCount | None = None,
    when_idle: Callable[[], None] | None = None,
) -> Iterator[Done]:
    """Yield sequences as they complete, until the queue is finished; on every rank the same.

    The pipeline and tensor-parallel groups communicate: all their ranks iterate to the end, over queues
    that were made alike. Data- and context-parallel ranks work on their own.

    Args:
        stage: this rank's part of the model, over the cache whose pages the queue hands out.
        queue: who runs.
        num_groups: groups that the queue was made with, at least the number of stages.
        ticks: counted up as turns pass.
        when_idle: called before a round for each turn of the last one that had no work, on every rank of both
            groups alike; all sequences that have ended were yielded, and no hidden state is on its way, so
            that it may communicate in the same groups.

    Raises:
        ValueError: fewer groups than stages.
        FloatingPointError: a row's logits are not finite, so that no token can be drawn.
        Preempted: a rank was asked to leave; on all ranks of both groups.
    """
    num_stages = stage.topology.layout.pp
    if num_groups < num_stages:
        raise ValueError(f"{num_groups} groups for {num_stages} stages: some stage would always wait")
    ticks = TickCount() if ticks is None else ticks
    running: list[InFlightStep | None] = [None] * num_groups
    topology, num_rounds, num_idle = stage.topology, 0, 0
    while not queue.is_finished:
        heartbeat()
        num_rounds += 1
        if num_rounds % _ROUNDS_BETWEEN_WISHES == 0 and preemption_requested(
            (topology.tp_group, topology.device), (topology.pp_host_group, torch.device("cpu"))
        ):
            _finish_turns(stage, [], running)
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
                    # Every rank is here: what is on its way between them must not meet the next run.
                    _finish_turns(stage, running[:group], running[group:])
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


def _advance_further(stage: GenerationStage, turns: Sequence[InFlightStep | None]) -> None:
    """Run the chunks behind the first of every turn."""
    for chunk in range(1, stage.num_chunks):
        for step in turns:
            if step is not None:
                with span("token step"):
                    stage.advance(step, chunk)


def _finish_turns(
    stage: GenerationStage, begun: Sequence[InFlightStep | None], computed: Sequence[InFlightStep | None]
) -> None:
    """Take every turn to its end, whatever it draws: turns of this round, and turns of the last one."""
    _advance_further(stage, begun)
    for step in (*computed, *begun):
        if step is not None:
            with contextlib.suppress(FloatingPointError):
                stage.sampled(step)
    stage.finish()
