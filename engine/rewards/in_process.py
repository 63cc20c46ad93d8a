"""A reward function that is called in this process, where a call that does not return cannot be ended."""

import os
import threading
import time
from collections.abc import Callable, Sequence

from glm_rlhf.engine.rewards.function import Reward, RewardFailure, RewardFunction, RewardRequest
from glm_rlhf.parallel.runtime.log import log

_EXIT_CODE = 2  # of an error that the user has to fix


class InProcessReward:
    """Owns the times at which calls of a function began.

    A call past its time ends the run. In a background thread, `overdue` says so to the thread that waits; on
    the main thread nothing waits, and the process ends after one sentence.
    """

    def __init__(
        self,
        function: RewardFunction,
        *,
        name: str,
        timeout_s: float,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """Call nothing yet.

        Args:
            function: the reward function.
            name: of it, in messages.
            timeout_s: longest time of a call in seconds.
            end: called with the exit code to end the process.
        """
        self._function, self.name, self.timeout_s, self._end = function, name, timeout_s, end
        self._begun: dict[int, float] = {}

    def __call__(self, requests: Sequence[RewardRequest]) -> Sequence[Reward | RewardFailure]:
        """Return what the function returns."""
        if threading.current_thread() is not threading.main_thread():
            number = threading.get_ident()
            self._begun[number] = time.monotonic()
            try:
                return self._function(requests)
            finally:
                del self._begun[number]
        timer = threading.Timer(self.timeout_s, self._end_process)
        timer.daemon = True
        timer.start()
        try:
            return self._function(requests)
        finally:
            timer.cancel()

    def overdue(self) -> str | None:
        """Return the sentence on a call in a background thread that is past its time; None: there is none."""
        now = time.monotonic()
        is_overdue = any(now - begun > self.timeout_s for begun in list(self._begun.values()))
        return self._sentence() if is_overdue else None

    def _end_process(self) -> None:
        log(self._sentence())
        self._end(_EXIT_CODE)

    def _sentence(self) -> str:
        return (
            f"the reward function {self.name} did not return within {self.timeout_s:g} s "
            "(reward.function_timeout_s), and cannot be ended in this process: name it as module:function "
            "with reward.workers above 0, or raise reward.function_timeout_s"
        )
