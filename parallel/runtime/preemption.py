"""A wish to save and leave, which a signal brings to any rank and on which all ranks act at one place."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a rank to leave; the second signal of a kind does what it did before."""

_is_heeded = False
_is_wished = False
_handlers_before: dict[int, Any] = {}


class Preempted(Exception):
    """Raised on all ranks where they leave what they were doing, since one of them was asked to."""


@contextlib.contextmanager
def handle_preemption_signals() -> Iterator[None]:
    """Take `SIGNALS` as a wish to leave while the block runs; every rank enters, on its main thread.

    Where the block raises, a first signal still ends nothing until `restore_handlers`: as soon as one rank
    is gone the launcher sends SIGTERM to the others, which have not said yet where they failed.
    """
    global _is_heeded, _is_wished
    restore_handlers()
    for number in SIGNALS:
        _handlers_before[number] = signal.signal(number, _wish)
    _is_heeded = True
    try:
        yield
        restore_handlers()
    finally:
        _is_heeded = _is_wished = False


def restore_handlers() -> None:
    """Have signals do again what they did before they were heeded."""
    while _handlers_before:
        signal.signal(*_handlers_before.popitem())


def _wish(number: int, _frame: object) -> None:
    global _is_wished
    _is_wished = True
    signal.signal(number, _handlers_before.pop(number))


@contextlib.contextmanager
def defer_preemption() -> Iterator[None]:
    """Let the block end before a wish is heeded; every rank enters."""
    global _is_heeded
    before, _is_heeded = _is_heeded, False
    try:
        yield
    finally:
        _is_heeded = before


def preemption_requested(*places: tuple[dist.ProcessGroup | None, torch.device]) -> bool:
    """Return whether any rank was asked to leave, the same on all ranks of the groups.

    All ranks of the groups call it together: 8 bytes are all-reduced in each, one after the other. Where
    signals are not heeded nothing is communicated.

    Args:
        places: groups, None for the world, with the device that their collectives take.
    """
    if not _is_heeded:
        return False
    answer = int(_is_wished)
    for group, device in places:
        wish = torch.tensor([answer], device=device)
        dist.all_reduce(wish, op=dist.ReduceOp.MAX, group=group)
        answer = int(wish)
    return bool(answer)
