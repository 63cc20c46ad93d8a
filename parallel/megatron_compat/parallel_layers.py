"""Megatron-core's layers with settings that their constructors do not take."""

import contextlib
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer


def keep_grad_mode(layer: TransformerLayer) -> None:
    """Have a layer add to the residual with gradients on or off, as its caller has them.

    It would turn them on, whatever the caller wants: a pass without gradients would keep a graph of the sum.
    """
    layer.bias_dropout_add_exec_handler = contextlib.nullcontext


def column_parallel_without_input_communication(
    input_size: int, output_size: int, **options: Any
) -> ColumnParallelLinear:
    """Return a column-parallel layer whose caller gathers the input and reduces its gradient.

    The constructor takes `disable_grad_reduce` for the second, but turns on the first with the config's
    sequence parallelism.
    """
    linear = ColumnParallelLinear(input_size, output_size, disable_grad_reduce=True, **options)
    linear.sequence_parallel = False
    return linear
