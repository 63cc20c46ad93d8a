"""Packed sequences: one stream of tokens per micro-batch, split over context-parallel ranks.

A micro-batch is a stream `[T]` with the boundaries `cu_seqlens [B+1]`. Sequence and context
parallelism need T to be a multiple of `Layout.token_multiple`: padding tokens are appended as one more
sequence, which no mask selects. Context-parallel rank r of c holds chunks r and 2c-1-r of 2c equal
chunks of the stream, so that each rank has early and late tokens and equal work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTokens:
    """Whole sequences in one stream, equal on all ranks that process them."""

    tokens_T: torch.Tensor
    """Token ids, int64 [T], padding included."""
    lengths: tuple[int, ...]
    """Length of each real sequence, in tokens; zero is allowed."""
    num_padding: int
    """Tokens at the end of the stream that belong to no sequence."""

    @property
    def num_tokens(self) -> int:
        """T: length of the stream, padding included."""
        return self.tokens_T.shape[0]

    @property
    def boundaries(self) -> list[int]:
        """Start of every sequence and the end of the last one, padding excluded: B + 1 numbers."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return starts

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of every non-empty run of tokens that attend to each other, padding included."""
        starts = self.boundaries
        spans = [(a, b) for a, b in pairwise(starts) if b > a]
        if self.num_padding:
            spans.append((starts[-1], self.num_tokens))
        return spans

    def to(self, device: torch.device) -> "PackedTokens":
        """Return the same stream on `device`."""
        tokens_T = self.tokens_T.to(device, non_blocking=True)
        return PackedTokens(tokens_T=tokens_T, lengths=self.lengths, num_padding=self.num_padding)

    def split_in_two(
        self, multiple: int, *, num_together: int = 1
    ) -> "list[tuple[PackedTokens, slice, slice]]":
        """Return the stream split between sequences into two parts of about equal tokens, or nothing.

        Args:
            multiple: `Layout.token_multiple`.
            num_together: sequences that stay together, such as the two of a pair.

        Returns:
            (part, its tokens, its sequences), as slices of this stream; empty if no split leaves tokens on
            both sides.
        """
        starts = self.boundaries
        end = len(self.lengths)
        cuts = [cut for cut in range(num_together, end, num_together) if 0 < starts[cut] < starts[-1]]
        if not cuts:
            return []
        cut = min(cuts, key=lambda place: abs(2 * starts[place] - starts[-1]))
        pieces = self.split(self.tokens_T)
        return [
            (pack(pieces[a:b], multiple=multiple), slice(starts[a], starts[b]), slice(a, b))
            for a, b in ((0, cut), (cut, end))
        ]

    def split(self, values_T: torch.Tensor) -> list[torch.Tensor]:
        """Return the part of `values_T` (first dim T) that belongs to each real sequence, as views."""
        starts = self.boundaries
        return [values_T[a:b] for a, b in pairwise(starts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A contiguous range of this rank's queries that attends to one contiguous range of keys."""

    query_start: int
    """First query, as a row of this rank's tokens."""
    query_end: int
    """One past the last query."""
    key_start: int
    """First key, as a row of the whole stream."""
    key_end: int
    """One past the last key."""
    query_lengths: tuple[int, ...]
    """Queries of each sequence in the segment; they sum to query_end - query_start."""
    key_lengths: tuple[int, ...]
    """Keys of each sequence; the last query of a sequence sees all of them (causal from the end)."""
    query_cu_seqlens: torch.Tensor
    """Cumulative `query_lengths`, int32 [number of sequences + 1], on the device."""
    key_cu_seqlens: torch.Tensor
    """Cumulative `key_lengths`, int32 [number of sequences + 1], on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShard:
    """The part of a stream that one context-parallel rank processes."""

    packed: PackedTokens
    """The whole stream."""
    rows: torch.Tensor | None
    """Rows of the stream that this rank holds, int64 [T / cp], in its order; None when it holds all."""
    segments: tuple[Segment, ...]
    """Attention ranges of this rank's rows, in order."""
    stream_order: torch.Tensor | None
    """Permutation that puts rows gathered rank by rank into stream order, int64 [T]; None without cp."""
    positions_T: torch.Tensor
    """Rotary position of each row of this rank, int64: 0 at the start of its sequence."""

    def take(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of `values_T` (first dim T)."""
        return values_T if self.rows is None else values_T[self.rows]


def pack(sequences: Sequence[torch.Tensor], *, multiple: int = 1, padding_token: int = 0) -> PackedTokens:
    """Return concatenated token sequences, padded to a multiple of `multiple` tokens.

    Args:
        sequences: token ids, each 1-D and integer; a sequence may be empty, but not all of them.
        multiple: `Layout.token_multiple`.
        padding_token: any id of the vocabulary; results of padding are never used.

    Raises:
        ValueError: there is no token, or a sequence is not a 1-D integer tensor.
    """
    for index, sequence in enumerate(sequences):
        if sequence.dim() != 1 or sequence.dtype not in _ID_DTYPES:
            raise ValueError(
                f"sequence {index} is a {sequence.dim()}-D tensor of {sequence.dtype}, "
                "give 1-D integer token ids"
            )
    lengths = tuple(sequence.shape[0] for sequence in sequences)
    if not sum(lengths):
        raise ValueError(f"{len(lengths)} sequences without a single token cannot be packed")
    num_padding = -sum(lengths) % multiple
    parts = [sequence.long() for sequence in sequences]
    if num_padding:
        parts.append(parts[0].new_full((num_padding,), padding_token))
    return PackedTokens(tokens_T=torch.cat(parts), lengths=lengths, num_padding=num_padding)


def share(packed: PackedTokens, *, cp_rank: int = 0, cp_size: int = 1) -> ContextShard:
    """Return the part of a stream that context-parallel rank `cp_rank` of `cp_size` processes.

    Raises:
        ValueError: the stream cannot be split into 2 · cp_size equal chunks.
    """
    total, device = packed.num_tokens, packed.tokens_T.device
    position_T = _positions(packed)
    if cp_size == 1:
        segment = _segment(packed.spans, 0, total, 0, device)
        return ContextShard(
            packed=packed,
            rows=None,
            segments=(segment,),
            stream_order=None,
            positions_T=position_T.to(device, non_blocking=True),
        )
    if total % (2 * cp_size):
        raise ValueError(
            f"{total} packed tokens are not a multiple of 2 × cp {cp_size}: pack with that multiple"
        )
    chunk = total // (2 * cp_size)
    mine = (cp_rank, 2 * cp_size - 1 - cp_rank)
    order = [c for rank in range(cp_size) for c in (rank, 2 * cp_size - 1 - rank)]
    place = {c: i for i, c in enumerate(order)}
    rows = torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in mine])
    stream_order = torch.cat(
        [torch.arange(place[c] * chunk, (place[c] + 1) * chunk) for c in range(2 * cp_size)]
    )
    segments = tuple(
        _segment(packed.spans, c * chunk, (c + 1) * chunk, i * chunk, device) for i, c in enumerate(mine)
    )
    return ContextShard(
        packed=packed,
        rows=rows.to(device, non_blocking=True),
        segments=segments,
        stream_order=stream_order.to(device, non_blocking=True),
        positions_T=position_T[rows].to(device, non_blocking=True),
    )


def _positions(packed: PackedTokens) -> torch.Tensor:
    return torch.cat([torch.arange(end - start) for start, end in packed.spans])


def _segment(
    spans: list[tuple[int, int]], start: int, end: int, local_start: int, device: torch.device
) -> Segment:
    """Return the attention range of stream rows [start, end): keys start with the first sequence in it."""
    inside = [(a, b) for a, b in spans if a < end and b > start]
    query_lengths = tuple(min(b, end) - max(a, start) for a, b in inside)
    key_lengths = tuple(min(b, end) - a for a, b in inside)
    return Segment(
        query_start=local_start,
        query_end=local_start + end - start,
        key_start=inside[0][0],
        key_end=end,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_cu_seqlens=_cumulative(query_lengths, device),
        key_cu_seqlens=_cumulative(key_lengths, device),
    )


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Non-blocking: otherwise the host would wait for all queued work of the device in every micro-batch.
    return torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
