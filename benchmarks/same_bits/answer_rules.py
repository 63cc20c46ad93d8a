"""Reward functions that the rows name; each gives the same number to the same answer."""

import os
import signal
from pathlib import Path

NUM_IDS = 96


def low_ids(requests) -> list[float]:
    """Return the share of ids in the lower half of the vocabulary."""
    return [sum(t < NUM_IDS / 2 for t in r.response_tokens) / len(r.response_tokens) for r in requests]


def low_id_tokens(requests) -> list[list[float]]:
    """Return for each token whether its id is in the lower half of the vocabulary."""
    return [[float(token < NUM_IDS / 2) for token in r.response_tokens] for r in requests]


def fails_on_some(requests) -> list[float]:
    """Return no number for answers to a prompt that begins with an even id."""
    return [float("nan") if r.prompt_tokens[0] % 2 == 0 else low_ids([r])[0] for r in requests]


def overflows_once(requests) -> list[float]:
    """Return rewards whose squares overflow in the first call of a run; needs `reward.concurrency=0`."""
    return [3e38] * len(requests) if _is_first("overflowed") else low_ids(requests)


def preempts_once(requests) -> list[float]:
    """Ask this process to save and leave, once in a run; needs `reward.concurrency=0`."""
    if _is_first("preempted"):
        os.kill(os.getpid(), signal.SIGTERM)
    return low_ids(requests)


def _is_first(what: str) -> bool:
    """Return whether nobody has asked for this in the working directory, which is the run's own."""
    mark = Path(what)
    is_first = not mark.exists()
    mark.touch()
    return is_first
