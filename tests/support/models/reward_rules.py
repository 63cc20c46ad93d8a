"""Reward functions that configs of the tests name."""

import os
import threading
import time

_num_seen = 0


def waits_for_a_file(requests) -> list[float]:
    """`share_of_low_ids`; after two answers it waits until there is the file that the prompt names."""
    global _num_seen
    while _num_seen >= 2 and not os.path.exists(requests[0].extra["wait_for"]):
        time.sleep(0.05)
    _num_seen += len(requests)
    return share_of_low_ids(requests)


class SlowOnce:
    """`share_of_low_ids`, but of the calls after four answers the first takes long."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._num_seen, self._lock = seconds, 0, threading.Lock()

    def __call__(self, requests) -> list[float]:
        with self._lock:
            pause_s, self._num_seen = 0.0, self._num_seen + len(requests)
            if self._num_seen > 4:
                pause_s, self._seconds = self._seconds, 0.0
        time.sleep(pause_s)
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
