"""Reward functions that configs of the tests name."""

import os
import signal
import threading
import time

_num_seen = 0


def waits_for_a_file(requests) -> list[float]:
    """`share_of_low_ids`; after four answers it waits until there is the file that the prompt names."""
    global _num_seen
    while _num_seen >= 4 and not os.path.exists(requests[0].extra["wait_for"]):
        time.sleep(0.05)
    _num_seen += len(requests)
    return share_of_low_ids(requests)


num_evaluated = 0
"""Answers that `signals_while_evaluated` has seen of prompts that say when it signals."""


def signals_while_evaluated(requests) -> list[float]:
    """`share_of_low_ids`; after as many answers as the prompt says it signals to the process, and waits."""
    global num_evaluated
    for request in requests:
        if "signals_after" not in request.extra:
            continue
        num_evaluated += 1
        if num_evaluated == request.extra["signals_after"]:
            os.kill(os.getpid(), signal.SIGTERM)
            while not os.path.exists(request.extra["wait_for"]):
                time.sleep(0.05)
    return share_of_low_ids(requests)


class SlowOnce:
    """`share_of_low_ids`, but of the calls after `num_fast` answers the first takes long."""

    def __init__(self, num_fast: int, seconds: float) -> None:
        self._num_fast, self._seconds = num_fast, seconds
        self._num_seen, self._lock = 0, threading.Lock()
        self.was_slow = False

    def __call__(self, requests) -> list[float]:
        with self._lock:
            self._num_seen += len(requests)
            is_slow = self._num_seen > self._num_fast and not self.was_slow
            self.was_slow = self.was_slow or is_slow
        if is_slow:
            time.sleep(self._seconds)
        return share_of_low_ids(requests)


def share_of_low_ids(requests) -> list[float]:
    """The share of ids below 48 in each answer."""
    return [sum(t < 48 for t in r.response_tokens) / len(r.response_tokens) for r in requests]


def raises(requests) -> list[float]:
    return [r.extra["missing"] for r in requests]


def too_few(requests) -> list[float]:
    return [0.0] * (len(requests) - 1)


def low_id_tokens(requests) -> list[list[float]]:
    """1 for each token below 48, 0 for the others."""
    return [[float(t < 48) for t in r.response_tokens] for r in requests]


def nan_after_long_prompts(requests) -> list[float]:
    """0.5, but NaN for prompts of more than 6 tokens."""
    return [0.5 if len(r.prompt_tokens) <= 6 else float("nan") for r in requests]
