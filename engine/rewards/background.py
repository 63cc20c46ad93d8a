"""Calls of a reward function in background threads, so that answers are judged while others are generated."""

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
    """Owns the threads that call a reward function, and what it said until somebody takes it.

    A thread lives while there are answers to judge, and takes an even share of those that wait. Which answers
    come together in a call depends on time; which call an answer is in does not matter to a function that
    judges each by itself. No call outlives its thread, and no more than `concurrency` ever run, those that
    were forgotten included. Threads do not keep a process alive.
    """

    def __init__(self, function: RewardFunction, *, concurrency: int, device: torch.device) -> None:
        """Start nothing yet.

        Args:
            function: judges answers.
            concurrency: most calls at once, at least one.
            device: where it finds itself if it uses CUDA, as on the main thread.
        """
        assert concurrency > 0
        self._device = device
        self._function, self._concurrency = function, concurrency
        self._changed = threading.Condition()
        self._idle = set(range(concurrency))  # numbers that no thread has
        self._waiting: dict[int, RewardRequest] = {}
        self._asked: set[int] = set()
        self._found: dict[int, Reward | RewardFailure] = {}
        self._round = 0  # answers of a round that was forgotten are dropped

    def ask(self, requests: Mapping[int, RewardRequest]) -> None:
        """Have answers judged, each under a number of its own; those asked for already are passed over."""
        with self._changed:
            new = {number: request for number, request in requests.items() if number not in self._asked}
            self._asked |= new.keys()
            self._waiting |= new
            for _ in range(min(len(self._idle), len(self._waiting))):
                thread = self._idle.pop()
                threading.Thread(
                    target=self._work, args=(thread,), name=f"reward {thread}", daemon=True
                ).start()

    def take(self, numbers: Sequence[int]) -> list[Reward | RewardFailure]:
        """Return what was said of answers that were asked for, in the order of `numbers`; waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: all(number in self._found for number in numbers))
            self._asked.difference_update(numbers)
            return [self._found.pop(number) for number in numbers]

    def discard(self) -> None:
        """Drop all that was asked for: what waits is not judged, what is being judged is not kept."""
        with self._changed:
            self._round += 1
            self._asked.clear()
            self._waiting.clear()
            self._found.clear()

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
                asked_in = self._round
            found = self._judge(list(batch.values()))
            with self._changed:
                if asked_in == self._round:
                    self._found |= dict(zip(batch, found, strict=True))
                    self._changed.notify_all()

    def _judge(self, requests: list[RewardRequest]) -> list[Reward | RewardFailure]:
        try:
            with span("reward call"):
                return call_reward_function(self._function, requests, skip_failures=True)
        except (
            BaseException
        ) as error:  # such as SystemExit, which would end the thread alone, and wait for ever
            reason = f"the reward function raised {type(error).__name__}: {error}"
            return [RewardFailure(reason=reason)] * len(requests)
