"""Whole sequences as packed micro-batches, with per-token tensors beside their tokens.

Records of files and sequences of rollouts become the same type. A stream is a tensor [T, ...] with a value
for each token of the micro-batch, by name: `mask` (bool, true for tokens that are trained on), `weights`,
`advantages` and whatever else a loss reads; zero or false at padding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from glm_rlhf.engine.data.batching import deal_micro_batches, pack_by_tokens
from glm_rlhf.engine.data.store.examples import Records
from glm_rlhf.engine.objectives.losses import answer_mask, answer_weights
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.model.packing import ContextShard, PackedTokens, pack, share
from glm_rlhf.parallel.runtime.topology import Topology

_SOURCE_ROW = "source_row"
"""Stream of a batch of rollouts: where each token stands in the rollouts' own stream, int64."""

Streams = Mapping[str, torch.Tensor]
StreamsOfRecords = Callable[[Sequence[int], Sequence[int], int], Streams]
"""Returns the streams of packed records, on the host, given (lengths, prompt_lengths, T)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch: whole sequences in one packed stream."""

    packed: PackedTokens
    """Their tokens, on the device."""
    items: tuple[int, ...]
    """Numbers of the records, or of the rollouts' sequences, in the stream's order."""
    sequences_per_item: int = 1
    """Sequences of each item, which are never parted: 2 for the answers of a pair."""
    streams: Streams = field(default_factory=dict)
    """Per-token tensors by name, [T, ...], on the device."""

    def split_in_two(self, multiple: int) -> "tuple[PackedBatch, ...]":
        """Return the items in two micro-batches, or this one alone; see `oom_retry.Divisible`."""
        count = self.sequences_per_item
        return tuple(
            PackedBatch(
                packed=packed,
                items=self.items[own.start // count : own.stop // count],
                sequences_per_item=count,
                streams={name: _padded(values[tokens], packed) for name, values in self.streams.items()},
            )
            for packed, tokens, own in self.packed.split_in_two(multiple, num_together=count)
        ) or (self,)

    def shard(self, topology: Topology) -> ContextShard:
        """Return this context-parallel rank's part of the stream."""
        return share(self.packed, cp_rank=topology.cp_rank, cp_size=topology.layout.cp)

    def count(self, name: str) -> torch.Tensor:
        """Return the number of true entries of a bool stream in each sequence, int64 [B]."""
        before_T = torch.nn.functional.pad(self.streams[name].cumsum(0), (1, 0))
        return before_T[torch.tensor(self.packed.boundaries, device=before_T.device)].diff()

    def put(self, found_T: torch.Tensor, values_T: torch.Tensor) -> None:
        """Write per-token results of a batch of rollouts to their places in the rollouts' stream."""
        num_tokens = self.packed.num_tokens - self.packed.num_padding
        values_T[self.streams[_SOURCE_ROW][:num_tokens]] = found_T[:num_tokens]


def answer_streams(lengths: Sequence[int], prompt_lengths: Sequence[int], num_tokens: int) -> Streams:
    """Return `mask`, true for the tokens of answers: what losses on records read."""
    return {"mask": answer_mask(lengths, prompt_lengths, num_tokens=num_tokens)}


def weighted_answer_streams(
    lengths: Sequence[int], prompt_lengths: Sequence[int], num_tokens: int, *, discount: float
) -> Streams:
    """Return `mask` as above, and `weights`, fp32: discount^i for the i-th token of each answer, else 0."""
    weights_T = answer_weights(lengths, prompt_lengths, num_tokens=num_tokens, discount=discount)
    return {**answer_streams(lengths, prompt_lengths, num_tokens), "weights": weights_T}


def batches_of_records(
    records: Records,
    numbers: Sequence[int],
    *,
    max_tokens: int,
    topology: Topology,
    streams: StreamsOfRecords = answer_streams,
) -> list[PackedBatch]:
    """Return the micro-batches of this rank's share of `numbers`, the same on all ranks of its model copy.

    Nothing is communicated. A share is empty where there are fewer records than data-parallel ranks; such a
    rank still calls the schedule, which knows about it.

    Args:
        records: where the numbers point to.
        numbers: of the whole step, over all data-parallel ranks.
        max_tokens: of a micro-batch; one record that is longer gets one of its own.
        topology: layout and rank.
        streams: makes the per-token tensors.
    """
    lengths = records.lengths[list(numbers)].tolist()
    dealt = deal_micro_batches(lengths, num_ranks=topology.dp, max_tokens=max_tokens)
    return [
        _packed_records(records, tuple(numbers[i] for i in group), topology, streams)
        for group in dealt[topology.dp_rank]
        if group
    ]


def batches_of_rollouts(
    rollouts: Rollouts,
    numbers: Sequence[int],
    *,
    max_tokens: int,
    topology: Topology,
    streams: Streams | None = None,
) -> list[PackedBatch]:
    """Return sequences of rollouts in micro-batches of at most `max_tokens` tokens.

    Args:
        rollouts: this data-parallel rank's.
        numbers: which of its sequences, by number from 0.
        max_tokens: of a micro-batch; a longer sequence gets one of its own.
        topology: layout and rank.
        streams: per-token tensors of the rollouts, [T, ...]; the batches get their part of each.
    """
    starts = rollouts.starts
    groups = pack_by_tokens([rollouts.lengths[number] for number in numbers], max_tokens=max_tokens)
    batches = []
    for group in groups:
        items = tuple(numbers[i] for i in group)
        spans = [(starts[item], starts[item + 1]) for item in items]
        packed = pack([rollouts.tokens_T[a:b] for a, b in spans], multiple=topology.layout.token_multiple)
        rows = torch.cat([torch.arange(a, b, device=rollouts.tokens_T.device) for a, b in spans])
        taken = {name: _padded(values_T[rows], packed) for name, values_T in (streams or {}).items()}
        taken[_SOURCE_ROW] = _padded(rows, packed)
        batches.append(PackedBatch(packed=packed, items=items, streams=taken))
    return batches


def _padded(values: torch.Tensor, packed: PackedTokens) -> torch.Tensor:
    """Return the values of a stream's real tokens, zero or false at its padding."""
    values = values[: packed.num_tokens - packed.num_padding]
    if not packed.num_padding:
        return values
    return torch.cat((values, values.new_zeros((packed.num_padding, *values.shape[1:]))))


def _packed_records(
    records: Records, numbers: tuple[int, ...], topology: Topology, streams: StreamsOfRecords
) -> PackedBatch:
    examples = [records.examples(number) for number in numbers]
    flat = [example for of_record in examples for example in of_record]
    packed = pack([example.tokens_T for example in flat], multiple=topology.layout.token_multiple)
    made = streams(packed.lengths, [example.num_prompt for example in flat], packed.num_tokens)
    return PackedBatch(
        packed=packed.to(topology.device),
        items=numbers,
        sequences_per_item=len(flat) // len(numbers),
        streams={name: values.to(topology.device, non_blocking=True) for name, values in made.items()},
    )
