"""Calls of a reward function in background threads, so that answers are scored while others are generated."""

import threading
from collections.abc import Mapping, Sequence

import torch

from glm_rlhf.engine.rewards.function import (
    Reward,
    RewardFailure,
    RewardFunction,
    RewardRequest,
    call_reward_function,
)
from glm_rlhf.parallel.runtime.spans import span


class BackgroundRewards:
    """Owns the threads that call a reward function, and its results until they are taken.

    A thread lives while there are answers to score; each call takes an even share of the waiting ones. Which
    answers share a call depends on time, which makes no difference to a function that scores each answer by
    itself. At most `concurrency` calls run at once, discarded ones included. The threads are daemons.
    """

    def __init__(self, function: RewardFunction, *, concurrency: int, device: torch.device) -> None:
        """Start no thread yet.

        Args:
            function: the reward function.
            concurrency: most calls at once, at least one.
            device: current CUDA device of the threads, as on the main thread.
        """
        assert concurrency > 0
        self._device = device
        self._function, self._concurrency = function, concurrency
        self._changed = threading.Condition()
        self._idle = set(range(concurrency))  # thread numbers not in use
        self._waiting: dict[int, RewardRequest] = {}
        self._submitted: set[int] = set()
        self._results: dict[int, Reward | RewardFailure] = {}
        self._round = 0  # results of an earlier, discarded round are dropped

    def submit(self, requests: Mapping[int, RewardRequest]) -> None:
        """Queue answers for scoring under their numbers; numbers submitted before are skipped."""
        with self._changed:
            new = {number: request for number, request in requests.items() if number not in self._submitted}
            self._submitted |= new.keys()
            self._waiting |= new
            for _ in range(min(len(self._idle), len(self._waiting))):
                thread = self._idle.pop()
                threading.Thread(
                    target=self._work, args=(thread,), name=f"reward {thread}", daemon=True
                ).start()

    def wait(self, numbers: Sequence[int], *, timeout_s: float) -> bool:
        """Return whether the results of submitted answers are there, as soon as they are, or after a time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(number in self._results for number in numbers), timeout_s
            )

    def take(self, numbers: Sequence[int]) -> list[Reward | RewardFailure]:
        """Return the results of submitted answers, in the order of `numbers`; waits until all are there."""
        with self._changed:
            self._changed.wait_for(lambda: all(number in self._results for number in numbers))
            self._submitted.difference_update(numbers)
            return [self._results.pop(number) for number in numbers]

    def discard(self) -> None:
        """Drop everything submitted: waiting answers are not scored, results of running calls not kept."""
        with self._changed:
            self._round += 1
            self._submitted.clear()
            self._waiting.clear()
            self._results.clear()

    def _work(self, thread: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while True:
            with self._changed:
                if not self._waiting:
                    self._idle.add(thread)
                    return
                count = -(-len(self._waiting) // self._concurrency)
                batch = {number: self._waiting.pop(number) for number in list(self._waiting)[:count]}
                round_of_call = self._round
            results = self._call(list(batch.values()))
            with self._changed:
                if round_of_call == self._round:
                    self._results |= dict(zip(batch, results, strict=True))
                    self._changed.notify_all()

    def _call(self, requests: list[RewardRequest]) -> list[Reward | RewardFailure]:
        try:
            with span("reward call"):
                return call_reward_function(self._function, requests, skip_failures=True)
        except BaseException as error:  # SystemExit, say, would end only this thread: `take` would hang
            reason = f"the reward function raised {type(error).__name__}: {error}"
            return [RewardFailure(reason=reason)] * len(requests)
