"""Sequences of a stream regrouped into micro-batches, their per-token tensors with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.engine.data.batching import pack_by_tokens
from glm_rlhf.parallel.model.packing import PackedTokens, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamBatch:
    """Some sequences of a stream as one micro-batch."""

    packed: PackedTokens
    """Their tokens."""
    rows: torch.Tensor
    """Where the micro-batch's real tokens stand in the stream, int64."""

    def split_in_two(self, multiple: int) -> "tuple[StreamBatch, ...]":
        """Return the sequences in two micro-batches, or this one alone; see `fitting.Divisible`."""
        return tuple(
            StreamBatch(packed=packed, rows=self.rows[tokens])
            for packed, tokens, _ in self.packed.split_in_two(multiple)
        ) or (self,)

    def take(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return the micro-batch's part of a stream's `values_T`, 0 or False at filler."""
        taken = values_T.new_zeros((self.packed.num_tokens, *values_T.shape[1:]))
        taken[: len(self.rows)] = values_T[self.rows]
        return taken

    def put(self, found: torch.Tensor, values_T: torch.Tensor) -> None:
        """Write results of the micro-batch to their places in the stream."""
        values_T[self.rows] = found[: len(self.rows)]


def stream_batches(
    tokens_T: torch.Tensor,
    lengths: Sequence[int],
    *,
    max_tokens: int,
    multiple: int,
    indices: Sequence[int] | None = None,
) -> list[StreamBatch]:
    """Return the sequences `indices` (all when None) in micro-batches of at most `max_tokens` tokens.

    Args:
        tokens_T: the stream, int64 [T].
        lengths: tokens of each of its sequences.
        max_tokens: budget of a micro-batch; a longer sequence is one of its own.
        multiple: `Layout.token_multiple`.
        indices: which sequences.
    """
    chosen = range(len(lengths)) if indices is None else indices
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups = pack_by_tokens([lengths[index] for index in chosen], max_tokens=max_tokens)
    batches = []
    for group in groups:
        spans = [(starts[chosen[place]], starts[chosen[place] + 1]) for place in group]
        rows = torch.cat([torch.arange(start, end, device=tokens_T.device) for start, end in spans])
        packed = pack([tokens_T[start:end] for start, end in spans], multiple=multiple)
        batches.append(StreamBatch(packed=packed, rows=rows))
    return batches
