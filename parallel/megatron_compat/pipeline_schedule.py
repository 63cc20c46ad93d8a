"""Megatron-core's pipeline schedules with another backward step: only a forward step is an argument."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.pipeline_parallel import schedules

BackwardStep = Callable[..., Any]
"""(input, output, gradient of the output, model type, config) → gradient of the input, of a list a list."""


@contextlib.contextmanager
def around_backward_steps(around: Callable[..., Any]) -> Iterator[None]:
    """Have the schedules that run in the block call `around` for each micro-batch's backward pass.

    They look up `backward_step` by its name in their module, in the order of the passes.

    Args:
        around: called with Megatron-core's own `BackwardStep`, then what the schedule gives that.
    """
    original: BackwardStep = schedules.backward_step

    def backward_step(*arguments: Any) -> Any:
        return around(original, *arguments)

    schedules.backward_step = backward_step
    try:
        yield
    finally:
        schedules.backward_step = original
