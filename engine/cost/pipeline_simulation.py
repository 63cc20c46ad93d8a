"""An iteration's pipelines played event by event: when each stage starts and ends each pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.pipeline_order import Pass, num_padding_micro_batches, stage_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of it."""

    seconds: float
    """From the first pass's start to the last one's end."""
    busy_s: tuple[float, ...]
    """Seconds that each stage computed."""

    @property
    def idle_fraction(self) -> float:
        """Share of the time, over all stages, in which a stage waited."""
        return 1.0 - sum(self.busy_s) / (len(self.busy_s) * self.seconds) if self.seconds else 0.0


Duration = Callable[[int, Pass], float]
"""`(stage, pass) -> seconds`; 0 for a filler."""


def play_passes(
    layout: Layout, num_micro_batches: int, duration: Duration, *, hop_s: float, forward_only: bool = False
) -> Played:
    """Return how long the micro-batches of one schedule take through all stages.

    A stage runs its passes in the order of `stage_order`. A pass starts when its stage is free and what it
    reads has come: from the stage before or, in backward, behind, `hop_s` after that one ended.
    """
    orders = [
        stage_order(layout, num_micro_batches, stage=stage, forward_only=forward_only)
        for stage in range(layout.pp)
    ]
    ended: dict[tuple[int, Pass], float] = {}
    place, free, busy = [0] * layout.pp, [0.0] * layout.pp, [0.0] * layout.pp
    has_moved = True
    while has_moved:
        has_moved = False
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                one = order[place[stage]]
                source = _source(layout, stage, one)
                if source is not None and source not in ended:
                    break
                ready = 0.0 if source is None else ended[source] + hop_s * (source[0] != stage)
                seconds = duration(stage, one)
                free[stage] = max(free[stage], ready) + seconds
                busy[stage] += seconds
                ended[stage, one] = free[stage]
                place[stage] += 1
                has_moved = True
    assert all(place[stage] == len(order) for stage, order in enumerate(orders)), "the order waits for itself"
    return Played(seconds=max(free), busy_s=tuple(busy))


def is_filler(layout: Layout, num_micro_batches: int, one: Pass) -> bool:
    """Return whether a pass belongs to an empty micro-batch."""
    return one.micro_batch < num_padding_micro_batches(layout, num_micro_batches)


def _source(layout: Layout, stage: int, one: Pass) -> tuple[int, Pass] | None:
    """Return the stage and pass whose output a pass reads; None for the first forward."""
    last_stage, last_chunk = layout.pp - 1, layout.vpp - 1
    if one.kind == "forward":
        if stage > 0:
            return stage - 1, one
        return None if one.chunk == 0 else (last_stage, Pass("forward", one.micro_batch, one.chunk - 1))
    if stage < last_stage:
        return stage + 1, one
    if one.chunk < last_chunk:
        return 0, Pass("backward", one.micro_batch, one.chunk + 1)
    return stage, Pass("forward", one.micro_batch, one.chunk)


def play_rounds(
    step_s: Sequence[float], *, num_groups: int, num_rounds: int, hop_s: float, back_s: float
) -> Played:
    """Return how long groups of sequences take to rotate through the stages of generation.

    Each group passes all stages once a round, and starts its next round when what was drawn has come back.

    Args:
        step_s: seconds of one group's step on each stage.
        num_groups: groups that take turns.
        num_rounds: tokens of each sequence.
        hop_s: seconds from a stage to the next.
        back_s: seconds from the last stage to the first.
    """
    free = [0.0] * len(step_s)
    returned = [0.0] * num_groups
    for _ in range(num_rounds):
        for group in range(num_groups):
            ready = returned[group]
            for stage, seconds in enumerate(step_s):
                free[stage] = max(free[stage], ready) + seconds
                ready = free[stage] + hop_s
            returned[group] = free[-1] + (back_s if len(step_s) > 1 else 0.0)
    num_steps = num_rounds * num_groups
    return Played(seconds=max(returned), busy_s=tuple(seconds * num_steps for seconds in step_s))
