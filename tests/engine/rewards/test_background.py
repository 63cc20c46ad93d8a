"""Rewards in background threads: each answer judged once, bounded calls, and faults that never hang."""

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
    """A reward function whose calls wait until they are let through."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Semaphore(0), threading.Semaphore(0)
        self.calls: list[list[float]] = []

    def __call__(self, requests) -> list[float]:
        self.calls.append(numbers_of(requests))
        self.begun.release()
        assert self.opened.acquire(timeout=30)
        return numbers_of(requests)


def test_what_ends_during_a_call_goes_into_the_next_and_comes_back_in_the_order_asked():
    gate, answers = Gate(), dict(enumerate(reward_requests(5)))
    judge = BackgroundRewards(gate, concurrency=1, device=CPU)
    judge.ask({3: answers[3]})
    assert gate.begun.acquire(timeout=30)
    for number in (1, 0, 4):
        judge.ask({number: answers[number]})
    judge.ask(answers)  # but for 2, all are asked for already
    gate.opened.release(2)
    assert judge.take(range(5)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert gate.calls == [[3.0], [1.0, 0.0, 4.0, 2.0]]


def test_no_more_calls_run_at_once_than_allowed():
    gate = Gate()
    judge = BackgroundRewards(gate, concurrency=2, device=CPU)
    judge.ask(dict(enumerate(reward_requests(5))))
    assert gate.begun.acquire(timeout=30)
    assert gate.begun.acquire(timeout=30)
    assert not gate.begun.acquire(timeout=0.05)
    gate.opened.release(5)
    assert judge.take(range(5)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [len(call) for call in gate.calls[:2]] == [3, 1]  # half of five, half of the two that are left


def test_what_was_forgotten_neither_comes_back_nor_runs_beside_what_follows():
    gate, answers = Gate(), reward_requests(3)
    judge = BackgroundRewards(gate, concurrency=1, device=CPU)
    judge.ask({0: answers[0]})
    assert gate.begun.acquire(timeout=30)
    judge.ask({1: answers[1]})
    judge.discard()
    judge.ask({0: answers[2]})  # the number 0 is another answer now
    assert not gate.begun.acquire(timeout=0.05)
    gate.opened.release(2)
    assert judge.take([0]) == [2.0]
    assert gate.calls == [[0.0], [2.0]]


def leaves(_: object) -> list[float]:
    raise SystemExit("enough")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (leaves, "raised SystemExit: enough"),
        (lambda _: 1 / 0, "raised ZeroDivisionError"),
        (lambda _: [1.0], "gave 1 rewards for 2 answers"),
        (lambda _: [float("nan")] * 2, "a finite number is required"),
        (lambda _: None, "raised TypeError"),
    ],
    ids=["leaves", "raises", "too few", "not finite", "nothing"],
)
def test_a_fault_comes_back_in_the_place_of_its_answers(function, words):
    judge = BackgroundRewards(function, concurrency=1, device=CPU)
    judge.ask(dict(enumerate(reward_requests(2))))
    found = judge.take([0, 1])
    assert all(isinstance(one, RewardFailure) and words in one.reason for one in found)
