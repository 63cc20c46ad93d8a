"""Shares of data-parallel ranks: every record once, whole, in streams that its layout can split."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glm_rlhf.engine.data.store.examples import Example
from glm_rlhf.engine.scoring.packed_batches import batches_of_records, weighted_answer_streams


class Pairs:
    """Records of two sequences: record n has prompts of 2, and answers of n + 1 and 1 tokens, all of id n."""

    lengths = np.array([2 * 2 + number + 2 for number in range(9)])

    def examples(self, number: int) -> tuple[Example, Example]:
        return tuple(
            Example(tokens_T=torch.full((2 + length,), number), num_prompt=2) for length in (number + 1, 1)
        )


def rank_of(rank: int, num_ranks: int, multiple: int = 1) -> SimpleNamespace:
    layout = SimpleNamespace(token_multiple=multiple, cp=1)
    return SimpleNamespace(dp=num_ranks, dp_rank=rank, layout=layout, device=torch.device("cpu"), cp_rank=0)


@pytest.mark.parametrize("num_ranks, max_tokens, multiple", [(1, 30, 1), (2, 20, 4), (3, 8, 2), (4, 1000, 8)])
def test_every_record_is_in_one_micro_batch_of_one_rank(num_ranks, max_tokens, multiple):
    numbers = [3, 0, 8, 5, 1, 2]
    seen = []
    for rank in range(num_ranks):
        for batch in batches_of_records(
            Pairs(),
            numbers,
            max_tokens=max_tokens,
            topology=rank_of(rank, num_ranks, multiple),
            streams=partial(weighted_answer_streams, discount=1.0),
        ):
            seen += batch.items
            assert batch.packed.num_tokens % multiple == 0
            real = batch.packed.num_tokens - batch.packed.num_padding
            assert real <= max_tokens or len(batch.items) == 1
            # Both answers of a record stand beside each other, in the order of the records.
            expected = [(number + 1, 1) for number in batch.items]
            assert batch.count("mask").tolist() == [length for pair in expected for length in pair]
            owners = [number for number in batch.items for _ in range(2)]
            for owner, part in zip(owners, batch.packed.split(batch.packed.tokens_T), strict=True):
                assert set(part.tolist()) == {owner}
            assert int(batch.streams["mask"].sum()) == sum(map(sum, expected))
            assert batch.streams["weights"].bool().equal(batch.streams["mask"])
    assert sorted(seen) == sorted(numbers)


def test_a_rank_without_a_record_has_no_micro_batch():
    shares = [
        batches_of_records(Pairs(), [4], max_tokens=100, topology=rank_of(rank, 3)) for rank in range(3)
    ]
    assert sorted(map(len, shares)) == [0, 0, 1]


def test_a_record_that_is_drawn_twice_counts_twice():
    (batch,) = batches_of_records(Pairs(), [6, 6], max_tokens=100, topology=rank_of(0, 1))
    assert batch.items == (6, 6)
