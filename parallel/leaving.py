"""A wish to save and leave, which a signal brings to any rank and on which all ranks act at one place."""

import contextlib
import signal
from collections.abc import Iterator

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a rank to leave; the second signal of a kind does what it did before."""

_is_heeded = False
_is_wished = False


class Leaving(Exception):
    """Raised on all ranks where they leave what they were doing, since one of them was asked to."""


@contextlib.contextmanager
def heeding_signals() -> Iterator[None]:
    """Take `SIGNALS` as a wish to leave while the block runs; every rank enters, on its main thread."""
    global _is_heeded, _is_wished
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def wish(number: int, _frame: object) -> None:
        global _is_wished
        _is_wished = True
        signal.signal(number, before[number])

    for number in SIGNALS:
        signal.signal(number, wish)
    _is_heeded = True
    try:
        yield
    finally:
        _is_heeded = _is_wished = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Let the block end before a wish is heeded; every rank enters."""
    global _is_heeded
    before, _is_heeded = _is_heeded, False
    try:
        yield
    finally:
        _is_heeded = before


def is_wished(*places: tuple[dist.ProcessGroup | None, torch.device]) -> bool:
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
