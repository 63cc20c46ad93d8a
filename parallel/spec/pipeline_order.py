"""The order in which a pipeline stage runs its passes, computed without ranks.

The order is Megatron-core's 1F1B, or interleaved 1F1B, with the padding micro-batches that `schedule` puts
first. A test records the order that real stages run.
"""

from dataclasses import dataclass
from typing import Literal

from glm_rlhf.parallel.spec.layout import Layout


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch through one model chunk."""

    kind: Literal["forward", "backward"]
    """Direction."""
    micro_batch: int
    """Index among the micro-batches that are run, padding first."""
    chunk: int
    """Index of the stage's model chunk."""


def num_padding_micro_batches(layout: Layout, num_micro_batches: int) -> int:
    """Return how many padding micro-batches run first.

    One if there is no real one; when interleaved, as many as fill the last group of pp micro-batches.
    """
    group = layout.pp if layout.vpp > 1 else 1
    return -max(num_micro_batches, 1) % group + (num_micro_batches == 0)


def stage_order(
    layout: Layout, num_micro_batches: int, *, stage: int, forward_only: bool = False
) -> list[Pass]:
    """Return the passes of pipeline stage `stage`, padding included, in order.

    Args:
        layout: of the model.
        num_micro_batches: without padding.
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
    steady = [item for pair in zip(forwards[num_first:], backwards, strict=False) for item in pair]
    return [*forwards[:num_first], *steady, *backwards[len(table) - num_first :]]


def num_in_flight(layout: Layout, num_micro_batches: int, *, stage: int) -> int:
    """Return the largest number of forward passes that wait for their backward on a stage."""
    total = (num_micro_batches + num_padding_micro_batches(layout, num_micro_batches)) * layout.vpp
    return min(total, _num_warm_up(layout, stage) + 1)


def _num_warm_up(layout: Layout, stage: int) -> int:
    """Return the number of forward passes before the first 1F1B pair."""
    num_later_stages = layout.pp - stage - 1
    return num_later_stages if layout.vpp == 1 else 2 * num_later_stages + (layout.vpp - 1) * layout.pp


def _table(layout: Layout, total: int) -> list[tuple[int, int]]:
    """Return (micro-batch, chunk) in the order of forward passes: groups of pp, one chunk after another."""
    group = layout.pp if layout.vpp > 1 else max(total, 1)
    return [
        (index, chunk)
        for first in range(0, total, group)
        for chunk in range(layout.vpp)
        for index in range(first, min(first + group, total))
    ]
