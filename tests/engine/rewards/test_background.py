"""Rewards in background threads: each answer scored once, bounded calls, and failures that never hang."""

import threading

import pytest
import torch
from reward_requests import reward_requests

from glm_rlhf.engine.rewards.background import BackgroundRewards
from glm_rlhf.engine.rewards.function import RewardFailure

CPU = torch.device("cpu")


def numbers_of(requests) -> list[float]:
    return [float(request.extra["answer"]) for request in requests]


class Gate:
    """A reward function whose calls wait until the test releases them."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Semaphore(0), threading.Semaphore(0)
        self.calls: list[list[float]] = []

    def __call__(self, requests) -> list[float]:
        self.calls.append(numbers_of(requests))
        self.begun.release()
        assert self.opened.acquire(timeout=300)
        return numbers_of(requests)


def test_answers_submitted_during_a_call_share_the_next_and_return_in_the_order_of_take():
    gate, answers = Gate(), dict(enumerate(reward_requests(5)))
    rewards = BackgroundRewards(gate, concurrency=1, device=CPU)
    rewards.submit({3: answers[3]})
    assert gate.begun.acquire(timeout=300)
    for number in (1, 0, 4):
        rewards.submit({number: answers[number]})
    rewards.submit(answers)  # all but 2 are submitted already
    gate.opened.release(2)
    assert rewards.take(range(5)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert gate.calls == [[3.0], [1.0, 0.0, 4.0, 2.0]]


def test_no_more_calls_run_at_once_than_allowed():
    gate = Gate()
    rewards = BackgroundRewards(gate, concurrency=2, device=CPU)
    rewards.submit(dict(enumerate(reward_requests(5))))
    assert gate.begun.acquire(timeout=300)
    assert gate.begun.acquire(timeout=300)
    assert not gate.begun.acquire(timeout=0.05)
    gate.opened.release(5)
    assert rewards.take(range(5)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [len(call) for call in gate.calls[:2]] == [3, 1]  # half of five, half of the two that are left


def test_discarded_answers_neither_return_nor_run_at_the_same_time_as_later_ones():
    gate, answers = Gate(), reward_requests(3)
    rewards = BackgroundRewards(gate, concurrency=1, device=CPU)
    rewards.submit({0: answers[0]})
    assert gate.begun.acquire(timeout=300)
    rewards.submit({1: answers[1]})
    rewards.discard()
    rewards.submit({0: answers[2]})  # the number 0 is another answer now
    assert not gate.begun.acquire(timeout=0.05)
    gate.opened.release(2)
    assert rewards.take([0]) == [2.0]
    assert gate.calls == [[0.0], [2.0]]


def leaves(_: object) -> list[float]:
    raise SystemExit("enough")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (leaves, "raised SystemExit: enough"),
        (lambda _: 1 / 0, "raised ZeroDivisionError"),
        (lambda _: [1.0], "returned 1 rewards for 2 answers"),
        (lambda _: [float("nan")] * 2, "a finite number is required"),
        (lambda _: None, "raised TypeError"),
    ],
    ids=["leaves", "raises", "too few", "not finite", "nothing"],
)
def test_a_failure_takes_the_place_of_its_rewards(function, words):
    rewards = BackgroundRewards(function, concurrency=1, device=CPU)
    rewards.submit(dict(enumerate(reward_requests(2))))
    results = rewards.take([0, 1])
    assert all(isinstance(result, RewardFailure) and words in result.reason for result in results)
