"""Micro-batches that memory has room for: where it runs out, the work is done again on smaller ones."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

import torch.distributed as dist

from glm_rlhf.parallel.model.packing import PackedTokens
from glm_rlhf.parallel.pipeline.multi_model import Chunks, unwrap
from glm_rlhf.parallel.pipeline.oom import OutOfMemory, groups_of
from glm_rlhf.parallel.runtime.topology import Topology


class Divisible(Protocol):
    """A micro-batch of whole records."""

    packed: PackedTokens
    """Its tokens."""

    def split_in_two(self, multiple: int) -> tuple[Self, ...]:
        """Return two micro-batches with the records of this one, in order, or itself alone where it has one.

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
    """Return what `run` makes of the micro-batches, and those that it was given in the end.

    Where memory runs out in one, all ranks of the schedule cut those of more than half its tokens and run
    again; the model remembers the size for every later call. The sum of a loss over its micro-batches
    is the same however they are cut, since its denominator is not a number of them.

    Args:
        run: one schedule, gradients made zero before it; called by all its ranks together.
        batches: this rank's.
        name: of a micro-batch with one record, for the message.
        models: this rank's chunks of each model in the schedule, wrapped for training or bare. What one
            holds leaves the others less: their micro-batches are cut alike.
        topology: layout and groups.
        forward_only: whether `run` keeps nothing for backward.

    Raises:
        ValueError: there is no room for a single record; on all ranks of the schedule.
    """
    limits = [unwrap(chunks[0]).most_tokens for chunks in models]
    roles = " and ".join(unwrap(chunks[0]).role for chunks in models)
    kind = "forward" if forward_only else "training"
    while True:
        limit = min((own[kind] for own in limits if kind in own), default=None)
        fitting = list(_cut(batches, limit, topology.layout.token_multiple))
        try:
            return run(fitting), fitting
        except OutOfMemory as fault:
            found = fault
        limit = max(min(found.num_tokens, limit or found.num_tokens) // 2, 1)
        for own in limits:
            own[kind] = limit
        _refuse_undivided(found, fitting, name, roles, topology, forward_only=forward_only)
        if found.index is not None:
            sys.stderr.write(
                f"[rank {topology.rank}] out of memory in a micro-batch of {found.num_tokens} tokens, "
                f"{roles}, {kind}: all of more than {limit} are split from here on\n"
            )


def _cut(batches: Sequence[Batch], most_tokens: int | None, multiple: int) -> Iterator[Batch]:
    """Return the micro-batches in order, those of too many tokens and several records cut."""
    for batch in batches:
        parts = (batch,)
        if most_tokens is not None and batch.packed.num_tokens > most_tokens:
            parts = batch.split_in_two(multiple)
        if len(parts) == 1:
            yield batch
        else:
            yield from _cut(parts, most_tokens, multiple)


def _refuse_undivided(
    fault: OutOfMemory,
    batches: Sequence[Batch],
    name: Callable[[Batch], str],
    roles: str,
    topology: Topology,
    *,
    forward_only: bool,
) -> None:
    """Stop all ranks of a schedule where the micro-batch that failed on one has a single record.

    With pipeline stages, where several are alive at once, only when no other can be cut either.
    """
    words = None
    if fault.index is not None:
        failed = batches[fault.index]
        others = batches if topology.layout.pp > 1 else [failed]
        if not any(len(batch.split_in_two(topology.layout.token_multiple)) > 1 for batch in others):
            words = (
                f"rank {topology.rank} has no memory for {name(failed)} by itself, "
                f"{failed.packed.num_tokens} tokens through the {roles}: set train.recompute_layers to "
                "true, raise parallel.tp, parallel.pp or parallel.cp, or exclude what is so long "
                "(data.max_tokens, data.max_prompt_tokens, generation.max_new_tokens)"
            )
    for group in groups_of(topology, forward_only=forward_only):
        everyone: list[str | None] = [None] * group.size()
        dist.all_gather_object(everyone, words, group=group)
        words = next((one for one in everyone if one is not None), None)
    if words is not None:
        raise ValueError(words)
