"""Several models in one pipeline schedule.

All micro-batches of one model come before those of the next, so that the pipeline fills and drains once and
not once per model. Alternating the models' micro-batches would not shorten the schedule, and with an
optimizer in backward all models would hold gradients at the same time.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import ContextShard
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.pipeline_order import num_padding_micro_batches

Chunks = Sequence[torch.nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledMicroBatch:
    """One micro-batch of the schedule."""

    model: int
    """Index of its model."""
    index: int | None
    """Index among all models' micro-batches, one model after another; None for padding."""
    share: ContextShard
    """This rank's part of it."""
    is_last: bool
    """Whether it is the model's last: the gradient is complete after it."""


def scheduled_micro_batches(
    shares: Sequence[Sequence[ContextShard]], padding: ContextShard, layout: Layout, *, is_final: bool
) -> list[ScheduledMicroBatch]:
    """Return the micro-batches of a schedule, in order.

    Padding comes first: reductions that overlap with backward need real gradients in the last micro-batch.

    Args:
        shares: this rank's parts of each model's micro-batches.
        padding: an empty micro-batch.
        layout: of all models.
        is_final: whether data-parallel ranks communicate during backward. They do so in the last micro-batch
            of each model and chunk, and must reach these in the same order for any number of micro-batches.
            Then every model gets at least one micro-batch, and no group of the interleaved schedule spans
            two models.
    """
    counts = [len(model_shares) for model_shares in shares]
    num_padding = [num_padding_micro_batches(layout, count) for count in counts]
    if not is_final:
        num_padding = [num_padding_micro_batches(layout, sum(counts)), *[0] * (len(counts) - 1)]
    scheduled, indices = [], itertools.count()
    for model, model_shares in enumerate(shares):
        work = [(None, padding)] * num_padding[model] + [(next(indices), share) for share in model_shares]
        scheduled += [
            ScheduledMicroBatch(model=model, index=index, share=share, is_last=position == len(work))
            for position, (index, share) in enumerate(work, start=1)
        ]
    return scheduled


def check_one_dtype(models: Sequence[Chunks]) -> None:
    """Raise ValueError where models of one schedule have different dtypes."""
    dtypes = {unwrap(chunks[0]).config.params_dtype for chunks in models}
    if len(dtypes) > 1:
        raise ValueError(
            f"models of {' and '.join(sorted(map(str, dtypes)))} cannot share a pipeline schedule: use one "
            "dtype for all"
        )


def communicates_in_backward(chunks: Chunks) -> bool:
    """Return whether gradients are reduced, or weights change, before the end of a schedule."""
    return unwrap(chunks[0]).config.no_sync_func is not None


@contextlib.contextmanager
def backward_of(chunks: Chunks, *, is_last: bool) -> Iterator[None]:
    """Run a backward pass; before a model's last one, gradients are only accumulated."""
    functions = unwrap(chunks[0]).config.no_sync_func
    if is_last or functions is None:
        functions = []
    with contextlib.ExitStack() as stack:
        for no_sync in functions if isinstance(functions, list) else [functions]:
            stack.enter_context(no_sync())
        yield


def unwrap(model: torch.nn.Module) -> GLMModel:
    """Return a chunk without its data-parallel wrapper."""
    return model if isinstance(model, GLMModel) else unwrap(model.module)
