"""Retry after out-of-memory errors: a schedule is repeated with its micro-batches split."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

import torch.distributed as dist

from glm_rlhf.parallel.model.packing import PackedTokens
from glm_rlhf.parallel.pipeline.multi_model import Chunks, unwrap
from glm_rlhf.parallel.pipeline.oom import OutOfMemory, groups_of
from glm_rlhf.parallel.runtime.log import log_rank
from glm_rlhf.parallel.runtime.topology import Topology


class Divisible(Protocol):
    """A micro-batch of whole records."""

    @property
    def packed(self) -> PackedTokens:
        """Its tokens."""

    def split_in_two(self, multiple: int) -> tuple[Self, ...]:
        """Return two micro-batches with the records of this one, in order; this one if it has one record.

        Args:
            multiple: `Layout.token_multiple`.
        """


Batch = TypeVar("Batch", bound=Divisible)
Result = TypeVar("Result")


def run_with_oom_retry(
    run: Callable[[Sequence[Batch]], Result],
    batches: Sequence[Batch],
    name: Callable[[Batch], str],
    *,
    models: Sequence[Chunks],
    topology: Topology,
    forward_only: bool,
) -> tuple[Result, list[Batch]]:
    """Return the result of `run`, and the micro-batches of its last call.

    If memory runs out in a micro-batch, all ranks of the schedule split those of more than half its tokens
    and run again; the models keep the limit for all later calls. Splitting does not change the sum of a loss
    over micro-batches, since its denominator does not depend on their number.

    Args:
        run: runs one schedule, zeroing gradients first; all ranks of the schedule call it together.
        batches: this rank's micro-batches.
        name: describes a micro-batch with one record, for the message.
        models: this rank's chunks of each model in the schedule, wrapped for training or bare. They share
            memory, so the same limit applies to all of them.
        topology: layout and groups.
        forward_only: whether `run` keeps nothing for backward.

    Raises:
        ValueError: a single record does not fit in memory; on all ranks of the schedule.
    """
    limits = [unwrap(chunks[0]).most_tokens for chunks in models]
    roles = " and ".join(unwrap(chunks[0]).role for chunks in models)
    kind = "forward" if forward_only else "training"
    while True:
        limit = min((model_limits[kind] for model_limits in limits if kind in model_limits), default=None)
        fitting = list(_split(batches, limit, topology.layout.token_multiple))
        try:
            return run(fitting), fitting
        except OutOfMemory as error:
            failure = error
        limit = max(min(failure.num_tokens, limit or failure.num_tokens) // 2, 1)
        for model_limits in limits:
            model_limits[kind] = limit
        _raise_if_unsplittable(failure, fitting, name, roles, topology, forward_only=forward_only)
        if failure.index is not None:
            log_rank(
                f"out of memory in a micro-batch of {failure.num_tokens} tokens, {roles}, {kind}: "
                f"micro-batches of more than {limit} tokens are split from here on",
                topology.rank,
            )


def _split(batches: Sequence[Batch], most_tokens: int | None, multiple: int) -> Iterator[Batch]:
    """Yield the micro-batches in order; split those with too many tokens and several records."""
    for batch in batches:
        parts = (batch,)
        if most_tokens is not None and batch.packed.num_tokens > most_tokens:
            parts = batch.split_in_two(multiple)
        if len(parts) == 1:
            yield batch
        else:
            yield from _split(parts, most_tokens, multiple)


def _raise_if_unsplittable(
    failure: OutOfMemory,
    batches: Sequence[Batch],
    name: Callable[[Batch], str],
    roles: str,
    topology: Topology,
    *,
    forward_only: bool,
) -> None:
    """Raise on all ranks of a schedule if the micro-batch that failed on one has a single record.

    With pipeline stages, where several are in flight, only if no other can be split either.
    """
    message = None
    if failure.index is not None:
        failed = batches[failure.index]
        candidates = batches if topology.layout.pp > 1 else [failed]
        if not any(len(batch.split_in_two(topology.layout.token_multiple)) > 1 for batch in candidates):
            message = (
                f"rank {topology.rank} has no memory for {name(failed)} by itself, "
                f"{failed.packed.num_tokens} tokens through the {roles}: set train.recompute_layers to "
                "true, raise parallel.tp, parallel.pp or parallel.cp, or exclude such long sequences "
                "(data.max_tokens, data.max_prompt_tokens, generation.max_new_tokens)"
            )
    for group in groups_of(topology, forward_only=forward_only):
        messages: list[str | None] = [None] * group.size()
        dist.all_gather_object(messages, message, group=group)
        message = next((text for text in messages if text is not None), None)
    if message is not None:
        raise ValueError(message)
