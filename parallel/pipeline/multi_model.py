"""Models that take turns in one pipeline schedule, which Megatron-core runs as if there were one.

Their micro-batches follow each other, one model's after the other's, so that stages wait once for the
pipeline to fill and to drain, and not once a model. What Megatron-core does at a model's last micro-batch and
at the schedule's end is done here, for each model by itself.

Alternating micro-batches would make no shorter schedule, and with an optimizer in backward all models would
hold gradients at once.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import ContextShard
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.pipeline_order import num_padding_micro_batches

Chunks = Sequence[torch.nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledMicroBatch:
    """One micro-batch of the schedule."""

    model: int
    """Which of the models it goes through."""
    index: int | None
    """Its place among all models' micro-batches, one model's after the other's; None for a filler, empty."""
    share: ContextShard
    """This rank's part of it."""
    is_last: bool
    """Whether the model has no turn after it: its gradient is complete then."""


def scheduled_micro_batches(
    shares: Sequence[Sequence[ContextShard]], padding: ContextShard, layout: Layout, *, is_final: bool
) -> list[ScheduledMicroBatch]:
    """Return the turns of a schedule, in order.

    Fillers come first: reductions that overlap with backward wait for gradients of the last micro-batch.

    Args:
        shares: of each model's micro-batches.
        filler: empty work.
        layout: of all models.
        is_final: whether data-parallel ranks communicate during backward. They do so in the last turn of
            each model and chunk, and have to come to these in the same order however many micro-batches
            each has: then every model has a turn, and the interleaved schedule, which takes groups of
            micro-batches, no group of two models.
    """
    counts = [len(own) for own in shares]
    missing = [num_padding_micro_batches(layout, count) for count in counts]
    if not is_final:
        missing = [num_padding_micro_batches(layout, sum(counts)), *[0] * (len(counts) - 1)]
    turns, indices = [], itertools.count()
    for model, own in enumerate(shares):
        work = [(None, padding)] * missing[model] + [(next(indices), share) for share in own]
        turns += [
            ScheduledMicroBatch(model=model, index=index, share=share, is_last=place == len(work))
            for place, (index, share) in enumerate(work, start=1)
        ]
    return turns


class MultiModelChunk(torch.nn.Module):
    """What Megatron-core's schedules take for a model chunk: the chunks of several models at its place."""

    def __init__(self, chunks: Chunks, config: TransformerConfig) -> None:
        """Take chunks and what `shared_config` gives; no weight becomes this module's."""
        super().__init__()
        self._chunks = tuple(chunks)
        self._input: list[torch.Tensor | None] = [None]
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = unwrap(chunks[0]).vp_stage

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        """Take the former stage's output, for the chunk whose turn comes."""
        self._input = input_tensor

    def take(self, turn: ScheduledMicroBatch) -> torch.nn.Module:
        """Return the chunk whose turn it is, with its input."""
        chunk = self._chunks[turn.model]
        unwrap(chunk).set_input_tensor(self._input)
        self._input = [None]
        return chunk


def shared_config(models: Sequence[Chunks]) -> TransformerConfig:
    """Return how Megatron-core is to run a schedule of several models.

    Raises:
        ValueError: their residual streams have different types.
    """
    configs = [unwrap(chunks[0]).config for chunks in models]
    types = {config.params_dtype for config in configs}
    if len(types) > 1:
        raise ValueError(
            f"models of {' and '.join(sorted(map(str, types)))} cannot share a pipeline schedule: give them "
            "all the same dtype"
        )
    config = copy.copy(configs[0])
    config.no_sync_func = None
    if configs[0].finalize_model_grads_func is not None:
        config.finalize_model_grads_func = partial(_finalize, models)
    return config


def communicates_in_backward(chunks: Chunks) -> bool:
    """Return whether gradients are reduced, or weights change, before a schedule's end."""
    return unwrap(chunks[0]).config.no_sync_func is not None


@contextlib.contextmanager
def backward_of(chunks: Chunks, *, is_last: bool) -> Iterator[None]:
    """Run a backward pass; unless it is a model's last one its gradients are added up and nothing else."""
    functions = unwrap(chunks[0]).config.no_sync_func
    if is_last or functions is None:
        functions = []
    with contextlib.ExitStack() as stack:
        for accumulating in functions if isinstance(functions, list) else [functions]:
            stack.enter_context(accumulating())
        yield


def unwrap(model: torch.nn.Module) -> GLMModel:
    """Return a chunk as it was before it was wrapped for training."""
    return model if isinstance(model, GLMModel) else unwrap(model.module)


def _finalize(models: Sequence[Chunks], _joint: object, num_tokens: object, **options: object) -> None:
    """Do for each model what Megatron-core would at the end of a schedule of its own."""
    for chunks in models:
        unwrap(chunks[0]).config.finalize_model_grads_func(list(chunks), num_tokens, **options)
