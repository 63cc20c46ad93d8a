"""From record numbers to the packed micro-batches of one data-parallel rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.engine.data.batching import deal_micro_batches
from glm_rlhf.engine.data.store.examples import Records
from glm_rlhf.engine.objectives.losses import answer_mask, answer_weights
from glm_rlhf.parallel.model.packing import ContextShard, PackedTokens, pack, share
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Whole records in one packed stream."""

    records: tuple[int, ...]
    """Their numbers, in the stream's order; each is as many sequences as its kind has."""
    packed: PackedTokens
    """Their tokens, on the device."""
    prompt_lengths: tuple[int, ...]
    """Tokens of each sequence's prompt."""

    @property
    def answer_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence's answer."""
        return tuple(a - b for a, b in zip(self.packed.lengths, self.prompt_lengths, strict=True))

    def split_in_two(self, multiple: int) -> "tuple[MicroBatch, ...]":
        """Return the records in two micro-batches, or this one alone; see `fitting.Divisible`."""
        num_together = len(self.packed.lengths) // len(self.records)
        return tuple(
            MicroBatch(
                records=self.records[own.start // num_together : own.stop // num_together],
                packed=packed,
                prompt_lengths=self.prompt_lengths[own],
            )
            for packed, _, own in self.packed.split_in_two(multiple, num_together=num_together)
        ) or (self,)

    def mask(self) -> torch.Tensor:
        """Return bool [T] on the device, true for the answers' tokens."""
        mask_T = answer_mask(self.packed.lengths, self.prompt_lengths, num_tokens=self.packed.num_tokens)
        return mask_T.to(self.packed.tokens_T.device, non_blocking=True)

    def weights(self, discount: float = 1.0) -> torch.Tensor:
        """Return fp32 [T] on the device: discount^i for the i-th token of each answer, else 0."""
        weights_T = answer_weights(
            self.packed.lengths,
            self.prompt_lengths,
            num_tokens=self.packed.num_tokens,
            discount=discount,
        )
        return weights_T.to(self.packed.tokens_T.device, non_blocking=True)

    def share_of(self, topology: Topology) -> ContextShard:
        """Return this rank's part of the stream."""
        return share(self.packed, cp_rank=topology.cp_rank, cp_size=topology.layout.cp)


def take_share(
    records: Records, numbers: Sequence[int], *, max_tokens: int, topology: Topology
) -> list[MicroBatch]:
    """Return the micro-batches of this rank's share of `numbers`, the same on all ranks of its model copy.

    Nothing is communicated. A share is empty where there are fewer records than data-parallel ranks; such a
    rank still calls the schedule, which knows about it.

    Args:
        records: where the numbers point to.
        numbers: of the whole step, over all data-parallel ranks.
        max_tokens: of a micro-batch; one record that is longer gets one of its own.
        topology: layout and rank.
    """
    lengths = records.lengths[list(numbers)].tolist()
    dealt = deal_micro_batches(lengths, num_ranks=topology.dp, max_tokens=max_tokens)
    return [
        _packed(records, tuple(numbers[i] for i in group), topology)
        for group in dealt[topology.dp_rank]
        if group
    ]


def _packed(records: Records, numbers: tuple[int, ...], topology: Topology) -> MicroBatch:
    examples = [example for number in numbers for example in records.examples(number)]
    packed = pack([example.tokens_T for example in examples], multiple=topology.layout.token_multiple)
    return MicroBatch(
        records=numbers,
        packed=packed.to(topology.device),
        prompt_lengths=tuple(example.num_prompt for example in examples),
    )
