"""The demo's tasks: right answers, careless demonstrations, nothing held out that is learned."""

import re
from statistics import fmean

import pytest

from glm_rlhf.engine.commands.demo.toy_task import CARELESS_SHARE, has_carry, toy_tasks, without_carry


def test_a_forgotten_carry_loses_ten_and_nothing_else():
    assert [without_carry(147, 5), without_carry(142, 5), without_carry(199, 1)] == [142, 147, 190]


def test_answers_are_right_and_demonstrations_forget_about_so_many_carries_as_they_say():
    tasks = toy_tasks(num_held_out=200, seed=3)
    forgets = []
    for task in tasks.sums + tasks.held_out_sums:
        a, b = numbers_in(task.prompt)
        assert task.answer == str(a + b)
        assert task.demonstration in (str(a + b), str(without_carry(a, b)))
        if has_carry(a, b):
            forgets.append(task.demonstration != task.answer)
    # Of some 2200 draws; three standard deviations are 0.029.
    assert abs(fmean(forgets) - CARELESS_SHARE) < 0.03
    for task in tasks.canaries + tasks.held_out_canaries:
        (number,) = numbers_in(task.prompt)
        assert task.answer == task.demonstration == str(number)[::-1]


def test_numbers_that_are_held_out_are_learned_in_no_wording():
    tasks = toy_tasks(num_held_out=200, seed=3)
    for learned, held_out in (
        (tasks.sums, tasks.held_out_sums),
        (tasks.canaries, tasks.held_out_canaries),
    ):
        asked = {numbers_in(task.prompt) for task in held_out}
        assert len(asked) == len(held_out) == 200
        assert asked.isdisjoint(numbers_in(task.prompt) for task in learned)


def test_tasks_follow_from_the_seed():
    assert toy_tasks(num_held_out=10, seed=1) == toy_tasks(num_held_out=10, seed=1)
    assert toy_tasks(num_held_out=10, seed=1) != toy_tasks(num_held_out=10, seed=2)


def test_too_many_held_out_are_refused():
    with pytest.raises(ValueError, match="num_held_out is 500: of 1500 sums 1 to 375"):
        toy_tasks(num_held_out=500, seed=1)


def numbers_in(text: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", text))
