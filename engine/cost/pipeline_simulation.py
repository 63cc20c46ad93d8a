"""Simulates the pipelines of an iteration: when each stage starts and ends each pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.pipeline_order import Pass, num_padding_micro_batches, stage_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """The result of a simulation."""

    seconds: float
    """From the start of the first pass to the end of the last one."""
    busy_s: tuple[float, ...]
    """Seconds that each stage computes."""

    @property
    def idle_fraction(self) -> float:
        """Mean share of the time in which a stage waits."""
        return 1.0 - sum(self.busy_s) / (len(self.busy_s) * self.seconds) if self.seconds else 0.0


Duration = Callable[[int, Pass], float]
"""`(stage, pass) -> seconds`; 0 for padding."""


def simulate_passes(
    layout: Layout, num_micro_batches: int, duration: Duration, *, hop_s: float, forward_only: bool = False
) -> Simulated:
    """Simulate the micro-batches of one schedule through all stages.

    A stage runs its passes in the order of `stage_order`. A pass starts when its stage is free and its input
    has arrived from the previous stage (in backward from the next one), `hop_s` after that pass ended.
    """
    orders = [
        stage_order(layout, num_micro_batches, stage=stage, forward_only=forward_only)
        for stage in range(layout.pp)
    ]
    ended: dict[tuple[int, Pass], float] = {}
    position, free, busy = [0] * layout.pp, [0.0] * layout.pp, [0.0] * layout.pp
    has_moved = True
    while has_moved:
        has_moved = False
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                entry = order[position[stage]]
                source = _source(layout, stage, entry)
                if source is not None and source not in ended:
                    break
                ready = 0.0 if source is None else ended[source] + hop_s * (source[0] != stage)
                seconds = duration(stage, entry)
                free[stage] = max(free[stage], ready) + seconds
                busy[stage] += seconds
                ended[stage, entry] = free[stage]
                position[stage] += 1
                has_moved = True
    assert all(position[stage] == len(order) for stage, order in enumerate(orders)), "the order deadlocks"
    return Simulated(seconds=max(free), busy_s=tuple(busy))


def is_padding(layout: Layout, num_micro_batches: int, entry: Pass) -> bool:
    """Return whether a pass belongs to a padding micro-batch."""
    return entry.micro_batch < num_padding_micro_batches(layout, num_micro_batches)


def _source(layout: Layout, stage: int, entry: Pass) -> tuple[int, Pass] | None:
    """Return the stage and pass whose output a pass reads; None for the first forward."""
    last_stage, last_chunk = layout.pp - 1, layout.vpp - 1
    if entry.kind == "forward":
        if stage > 0:
            return stage - 1, entry
        return None if entry.chunk == 0 else (last_stage, Pass("forward", entry.micro_batch, entry.chunk - 1))
    if stage < last_stage:
        return stage + 1, entry
    if entry.chunk < last_chunk:
        return 0, Pass("backward", entry.micro_batch, entry.chunk + 1)
    return stage, Pass("forward", entry.micro_batch, entry.chunk)


def simulate_generation(
    step_s: Sequence[float], *, num_groups: int, num_rounds: int, hop_s: float, back_s: float
) -> Simulated:
    """Simulate groups of sequences that rotate through the stages of generation.

    Each group passes all stages once per round, and starts its next round when its sampled tokens are back.

    Args:
        step_s: seconds of one group's step on each stage.
        num_groups: number of groups that alternate.
        num_rounds: tokens per sequence.
        hop_s: seconds from one stage to the next.
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
    return Simulated(seconds=max(returned), busy_s=tuple(seconds * num_steps for seconds in step_s))
