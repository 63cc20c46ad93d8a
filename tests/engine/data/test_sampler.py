"""Batches by step: coverage, and that nothing but the step's number decides them."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_rlhf.engine.data.sampler import BatchSampler

NUM_RECORDS = st.integers(1, 40)
BATCH_SIZE = st.integers(1, 50)
SEED = st.integers(0, 5)


def stream(sampler: BatchSampler, num_steps: int) -> list[int]:
    return [number for step in range(num_steps) for number in sampler.batch(step)]


def test_without_shuffling_batches_follow_the_file_round_and_round():
    sampler = BatchSampler(5, 3, seed=0, shuffles=False)
    assert [sampler.batch(step) for step in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert [sampler.epoch_of(step) for step in range(4)] == [0, 0, 1, 1]


@settings(deadline=None, max_examples=50)
@given(NUM_RECORDS, BATCH_SIZE, SEED, st.booleans())
def test_every_record_comes_once_an_epoch(num_records, batch_size, seed, shuffles):
    sampler = BatchSampler(num_records, batch_size, seed=seed, shuffles=shuffles, allows_repeats=True)
    numbers = stream(sampler, 3 * num_records)  # batch_size * 3 whole epochs
    assert all(len(sampler.batch(step)) == batch_size for step in range(3))
    for start in range(0, len(numbers), num_records):
        assert sorted(numbers[start : start + num_records]) == list(range(num_records))


@settings(deadline=None, max_examples=50)
@given(NUM_RECORDS, BATCH_SIZE, SEED)
def test_a_step_asked_alone_and_out_of_order_is_the_same(num_records, batch_size, seed):
    def new() -> BatchSampler:
        return BatchSampler(num_records, batch_size, seed=seed, allows_repeats=True)

    walked = [new().batch(step) for step in range(6)]
    sampler = new()
    assert [sampler.batch(step) for step in (5, 0, 3, 4, 2, 1)] == [walked[i] for i in (5, 0, 3, 4, 2, 1)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30), SEED)
def test_the_order_does_not_depend_on_the_batch_size(num_records, batch_size, seed):
    sampler = BatchSampler(num_records, batch_size, seed=seed, allows_repeats=True)
    single = BatchSampler(num_records, 1, seed=seed)
    assert stream(sampler, 4) == stream(single, 4 * batch_size)
    assert sampler.epoch_of(3) == single.epoch_of(3 * batch_size) == 3 * batch_size // num_records


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [BatchSampler(50, 50, seed=seed).batch(epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9


def test_every_record_is_as_likely_to_come_first():
    first = Counter(
        BatchSampler(4, 4, seed=seed).batch(epoch)[0] for seed in range(40) for epoch in range(25)
    )
    # 1000 draws of 1/4: a standard deviation is 13.7; 5 of them fail by chance once in a million.
    assert all(abs(first[record] - 250) < 69 for record in range(4)), first


def test_the_order_is_the_same_on_every_machine():
    # Numbers a resumed run relies on: they change with numpy's generator or with ours, never silently.
    assert BatchSampler(8, 8, seed=1234).batch(0) == [5, 6, 7, 0, 4, 1, 3, 2]
    assert BatchSampler(8, 8, seed=1234).batch(1) == [1, 4, 0, 2, 5, 7, 6, 3]


def test_what_a_batch_hands_out_is_the_callers_to_change():
    sampler = BatchSampler(5, 5, seed=0)
    before = sampler.batch(0)
    sampler.batch(0).clear()
    assert sampler.batch(0) == before


@pytest.mark.parametrize(
    ("num_records", "batch_size", "seed", "says"),
    [
        (0, 1, 0, "num_records is 0"),
        (1, 0, 0, "batch_size is 0"),
        (1, 1, -1, "seed is -1"),
        (7, 8, 0, "there are 7 records, a batch takes 8.*lower the batch to 7"),
    ],
)
def test_numbers_out_of_range_are_refused(num_records, batch_size, seed, says):
    with pytest.raises(ValueError, match=says):
        BatchSampler(num_records, batch_size, seed=seed)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step is -1"):
        BatchSampler(1, 1, seed=0).batch(-1)
    with pytest.raises(ValueError, match="step is -1"):
        BatchSampler(1, 1, seed=0).epoch_of(-1)
