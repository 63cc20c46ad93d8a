"""The order in which a pipeline stage runs its passes, worked out without ranks.

It is Megatron-core's: plain 1F1B, and its interleaved form, with the fillers that `schedule` puts before the
micro-batches. A test records what real stages do.
"""

from dataclasses import dataclass
from typing import Literal

from glm_rlhf.parallel.spec.layout import Layout


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch through one model chunk."""

    kind: Literal["forward", "backward"]
    """Which way."""
    micro_batch: int
    """Its place among those that are run, fillers first."""
    chunk: int
    """Which of the stage's chunks."""


def num_padding_micro_batches(layout: Layout, num_micro_batches: int) -> int:
    """Return how many empty micro-batches run first: one for none, up to whole groups when interleaved."""
    group = layout.pp if layout.vpp > 1 else 1
    return -max(num_micro_batches, 1) % group + (num_micro_batches == 0)


def stage_order(
    layout: Layout, num_micro_batches: int, *, stage: int, forward_only: bool = False
) -> list[Pass]:
    """Return the passes of pipeline stage `stage`, fillers included, in the order it runs them.

    Args:
        layout: of the model.
        num_micro_batches: real ones.
        stage: 0 ≤ stage < pp.
        forward_only: no backward passes.
    """
    total = num_micro_batches + num_padding_micro_batches(layout, num_micro_batches)
    table = _table(layout, total)
    forwards = [Pass("forward", index, chunk) for index, chunk in table]
    if forward_only:
        return forwards
    backwards = [Pass("backward", index, layout.vpp - 1 - chunk) for index, chunk in table]
    num_first = min(len(table), _num_warm_up(layout, stage))
    steady = [one for pair in zip(forwards[num_first:], backwards, strict=False) for one in pair]
    return [*forwards[:num_first], *steady, *backwards[len(table) - num_first :]]


def num_in_flight(layout: Layout, num_micro_batches: int, *, stage: int) -> int:
    """Return how many passes through a chunk wait for their backward on a stage at most."""
    total = (num_micro_batches + num_padding_micro_batches(layout, num_micro_batches)) * layout.vpp
    return min(total, _num_warm_up(layout, stage) + 1)


def _num_warm_up(layout: Layout, stage: int) -> int:
    """Return the forward passes before the first backward is due."""
    behind = layout.pp - stage - 1
    return behind if layout.vpp == 1 else 2 * behind + (layout.vpp - 1) * layout.pp


def _table(layout: Layout, total: int) -> list[tuple[int, int]]:
    """Return (micro-batch, chunk) in the order of forward passes: groups of pp, a chunk at a time."""
    group = layout.pp if layout.vpp > 1 else max(total, 1)
    return [
        (index, chunk)
        for first in range(0, total, group)
        for chunk in range(layout.vpp)
        for index in range(first, min(first + group, total))
    ]
