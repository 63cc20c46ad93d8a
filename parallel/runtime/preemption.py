"""Preemption: a signal asks any rank to save and exit, and all ranks act on it at the same step."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that request preemption; the second signal of a kind runs the previous handler."""

_is_enabled = False
_is_requested = False
_previous_handlers: dict[int, Any] = {}


class Preempted(Exception):
    """Raised on all ranks at the step at which they act on a preemption signal to one of them."""


@contextlib.contextmanager
def handle_preemption_signals() -> Iterator[None]:
    """Handle `SIGNALS` as preemption requests during the block; every rank enters, on its main thread.

    When the block raises, the handlers stay until `restore_handlers`: the launcher sends SIGTERM to all ranks
    as soon as one has exited, and the others must first report where they failed.
    """
    global _is_enabled, _is_requested
    restore_handlers()
    for number in SIGNALS:
        _previous_handlers[number] = signal.signal(number, _request)
    _is_enabled = True
    try:
        yield
        restore_handlers()
    finally:
        _is_enabled = _is_requested = False


def restore_handlers() -> None:
    """Restore the signal handlers from before `handle_preemption_signals`."""
    while _previous_handlers:
        signal.signal(*_previous_handlers.popitem())


def _request(number: int, _frame: object) -> None:
    global _is_requested
    _is_requested = True
    signal.signal(number, _previous_handlers.pop(number))


@contextlib.contextmanager
def defer_preemption() -> Iterator[None]:
    """Run a block that no preemption request interrupts; every rank enters."""
    global _is_enabled
    before, _is_enabled = _is_enabled, False
    try:
        yield
    finally:
        _is_enabled = before


def preemption_requested(*groups: tuple[dist.ProcessGroup | None, torch.device]) -> bool:
    """Return whether preemption was requested on any rank, the same on all ranks of the groups.

    All ranks of the groups call it together: 8 bytes are all-reduced in each, one after the other. Nothing
    communicates outside `handle_preemption_signals` or inside `defer_preemption`.

    Args:
        groups: process groups, None for the world, each with the device of its collectives.
    """
    if not _is_enabled:
        return False
    is_requested = int(_is_requested)
    for group, device in groups:
        flag = torch.tensor([is_requested], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        is_requested = int(flag)
    return bool(is_requested)
