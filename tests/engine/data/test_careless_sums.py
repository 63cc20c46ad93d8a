"""The demo's tasks: right answers, careless demonstrations, nothing held out that is learned."""

import re
from statistics import fmean

import pytest

from glm_rlhf.engine.data.careless_sums import (
    CARELESS_WITH_CARRY,
    CARELESS_WITHOUT_CARRY,
    careless_sum,
    careless_sums,
    has_carry,
)


def test_a_careless_sum_is_a_ten_off_in_the_direction_of_its_mistake():
    assert [careless_sum(147, 5), careless_sum(142, 5), careless_sum(199, 1)] == [142, 157, 190]


def test_answers_are_right_and_demonstrations_err_about_as_often_as_they_say():
    tasks = careless_sums(num_held_out=200, seed=3)
    errs = {True: [], False: []}
    for task in tasks.sums + tasks.held_out_sums:
        a, b = numbers_in(task.prompt)
        assert task.answer == str(a + b)
        assert task.demonstration in (str(a + b), str(careless_sum(a, b)))
        errs[has_carry(a, b)].append(task.demonstration != task.answer)
    # Of some 2300 and 1100 draws; three standard deviations are 0.030 and 0.043.
    assert abs(fmean(errs[True]) - CARELESS_WITH_CARRY) < 0.03
    assert abs(fmean(errs[False]) - CARELESS_WITHOUT_CARRY) < 0.043
    for task in tasks.canaries + tasks.held_out_canaries:
        (number,) = numbers_in(task.prompt)
        assert task.answer == task.demonstration == str(number)[::-1]


def test_numbers_that_are_held_out_are_learned_in_no_wording():
    tasks = careless_sums(num_held_out=200, seed=3)
    for learned, held_out in (
        (tasks.sums, tasks.held_out_sums),
        (tasks.canaries, tasks.held_out_canaries),
    ):
        asked = {numbers_in(task.prompt) for task in held_out}
        assert len(asked) == len(held_out) == 200
        assert asked.isdisjoint(numbers_in(task.prompt) for task in learned)


def test_tasks_follow_from_the_seed():
    assert careless_sums(num_held_out=10, seed=1) == careless_sums(num_held_out=10, seed=1)
    assert careless_sums(num_held_out=10, seed=1) != careless_sums(num_held_out=10, seed=2)


def test_too_many_held_out_are_refused():
    with pytest.raises(ValueError, match="num_held_out is 500: of 1800 sums 1 to 450"):
        careless_sums(num_held_out=500, seed=1)


def numbers_in(text: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", text))
