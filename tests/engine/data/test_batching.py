"""Shares and micro-batches: every sequence in one place, budgets kept, ranks even."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_rlhf.engine.data.batching import deal_by_tokens, deal_micro_batches, pack_by_tokens

LENGTHS = st.lists(st.integers(0, 60), max_size=30)
NUM_RANKS = st.integers(1, 6)
BUDGET = st.integers(1, 100)


def tokens(group, lengths) -> int:
    return sum(lengths[i] for i in group)


def test_packing_worked_by_hand():
    # 6 opens a group, 5 another, 4 joins 5 (9 of 9), 3 joins 6 (9 of 9), 2 opens a third, 1 joins it.
    assert pack_by_tokens([2, 6, 4, 5, 3, 1], max_tokens=9) == [(1, 4), (2, 3), (0, 5)]


@settings(deadline=None, max_examples=50)
@given(LENGTHS, BUDGET)
def test_packing_keeps_the_budget_and_every_sequence(lengths, budget):
    groups = pack_by_tokens(lengths, max_tokens=budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(tokens(group, lengths) <= budget or len(group) == 1 for group in groups)
    # First fit: but for the last, no two groups would fit into one.
    sums = [tokens(group, lengths) for group in groups]
    assert all(a + b > budget for i, a in enumerate(sums) for b in sums[i + 1 :])


def test_dealing_worked_by_hand():
    # 7 to rank 0, 6 to rank 1, 5 to rank 1, 4 to rank 0, 3 (both have 11 and 2 sequences) to rank 0.
    assert deal_by_tokens([3, 7, 5, 4, 6], 2) == [[0, 1, 3], [2, 4]]


def test_equal_loads_go_to_the_rank_with_fewer_sequences():
    assert deal_by_tokens([3, 3, 0, 0], 2) == [[0, 2], [1, 3]]
    assert deal_by_tokens([0, 0, 0], 3) == [[0], [1], [2]]


@settings(deadline=None, max_examples=50)
@given(LENGTHS, NUM_RANKS)
def test_dealing_gives_every_sequence_to_one_rank_and_no_rank_nothing(lengths, num_ranks):
    shares = deal_by_tokens(lengths, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert all(shares) or len(lengths) < num_ranks


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_dealing_is_within_grahams_bound_of_the_best(lengths, num_ranks):
    best = min(
        max(sum(n for n, r in zip(lengths, ranks, strict=True) if r == rank) for rank in range(num_ranks))
        for ranks in product(range(num_ranks), repeat=len(lengths))
    )
    fullest = max(tokens(share, lengths) for share in deal_by_tokens(lengths, num_ranks))
    assert 3 * num_ranks * fullest <= (4 * num_ranks - 1) * best


def test_equal_micro_batches_worked_by_hand():
    # Dealt: rank 0 gets 9 and 1 (with 10 tokens), rank 1 gets 5 and 4; budget 9 makes two groups and one.
    assert deal_micro_batches([9, 5, 4, 1], num_ranks=2, max_tokens=9) == [[(0,), (3,)], [(1,), (2,)]]


def test_a_rank_without_enough_sequences_gets_empty_micro_batches():
    assert deal_micro_batches([9, 3, 3, 3], num_ranks=2, max_tokens=3) == [[(0,), (), ()], [(1,), (2,), (3,)]]
    assert deal_micro_batches([5], num_ranks=3, max_tokens=8) == [[(0,)], [()], [()]]
    assert deal_micro_batches([], num_ranks=2, max_tokens=8) == [[], []]


@settings(deadline=None, max_examples=50)
@given(LENGTHS, NUM_RANKS, BUDGET)
def test_all_ranks_have_equally_many_micro_batches(lengths, num_ranks, budget):
    dealt = deal_micro_batches(lengths, num_ranks=num_ranks, max_tokens=budget)
    assert len(dealt) == num_ranks
    assert len({len(groups) for groups in dealt}) == 1
    assert sorted(i for groups in dealt for group in groups for i in group) == list(range(len(lengths)))
    shares = [sorted(i for group in groups for i in group) for groups in dealt]
    assert shares == deal_by_tokens(lengths, num_ranks)
    for groups, share in zip(dealt, shares, strict=True):
        assert all(tokens(group, lengths) <= budget or len(group) == 1 for group in groups)
        # Nothing is split without need: the number is one rank's own, or the share is down to single ones.
        assert sum(map(bool, groups)) == min(len(groups), len(share))
    packed = [pack_by_tokens([lengths[i] for i in share], max_tokens=budget) for share in shares]
    assert len(dealt[0]) == max(map(len, packed))


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="max_tokens is 0"):
        pack_by_tokens([1], max_tokens=0)
    with pytest.raises(ValueError, match="num_ranks is 0"):
        deal_by_tokens([1], 0)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        deal_micro_batches([1], num_ranks=1, max_tokens=0)
