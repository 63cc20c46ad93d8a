"""Preemption: a signal asks any rank to save and exit, and all ranks act on it at the same step.

A signal often arrives more than once: Slurm signals torchrun and its ranks, and torchrun forwards what it
gets; a terminal and torchrun both deliver a Ctrl-C. Repeats of a kind within `repeat_s` of the first are the
same request. A later one ends the process as if nothing were handled, for a person who does not want to wait.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that request preemption; SIGINT is a Ctrl-C."""
REPEAT_S = 20.0
"""Seconds from the first signal of a kind in which another one is the same request."""
CTRL_C_REPEAT_S = 2.0
"""The same for SIGINT."""

_is_inside = False
_is_enabled = False
_is_requested = False
_has_reported_repeat = False
_ends_at_once = False
_first_s: dict[int, float] = {}
_previous_handlers: dict[int, Any] = {}


class Preempted(Exception):
    """Raised on all ranks at the step at which they act on a preemption signal to one of them."""


@contextlib.contextmanager
def handle_preemption_signals() -> Iterator[None]:
    """Handle `SIGNALS` as preemption requests during the block; every rank enters, on its main thread.

    When the block raises, or was asked to end, the handlers stay until `restore_handlers`: the launcher sends
    SIGTERM to all ranks as soon as one has exited, and the others must first report where they failed; and
    the repeat of a signal may come when all is saved. A SIGINT that is ignored, as in a background job of a
    shell, stays ignored.
    """
    global _is_inside, _is_enabled, _is_requested, _ends_at_once
    restore_handlers()
    _ends_at_once = False
    for number in SIGNALS:
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            _previous_handlers[number] = signal.signal(number, _request)
    _is_inside = _is_enabled = True
    try:
        yield
        if not _first_s:
            restore_handlers()
    finally:
        _is_inside = _is_enabled = _is_requested = False


def restore_handlers() -> None:
    """Restore the signal handlers from before `handle_preemption_signals`, and forget what came."""
    global _has_reported_repeat
    while _previous_handlers:
        _restore(_previous_handlers.popitem())
    _first_s.clear()
    _has_reported_repeat = False


def ignore_repeats() -> None:
    """Restore the handlers, or ignore `SIGNALS` for the rest of the process where one of them has come.

    For the end of a process: the interpreter takes its own handlers away before it has closed everything, and
    a repeat of the signal would then turn a saved run's exit code into a failure.
    """
    if _first_s:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    else:
        restore_handlers()


def ends_at_once() -> bool:
    """Return whether a later signal has ended the run: what still waits must not."""
    return _ends_at_once


def _request(number: int, _frame: object) -> None:
    global _is_requested, _has_reported_repeat, _ends_at_once
    now, is_first = time.monotonic(), not _first_s
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    repeat_s = CTRL_C_REPEAT_S if number == signal.SIGINT else REPEAT_S
    if now - _first_s.setdefault(number, now) > repeat_s:
        _tell(f"{name} again, more than {repeat_s:g} s after the first: the run ends without a save")
        _ends_at_once = True
        _restore((number, _previous_handlers.pop(number)))
        os.kill(os.getpid(), number)
        return
    _is_requested = True
    if not _is_inside:
        return
    if is_first:
        again = "; another one ends it without a save" if number == signal.SIGINT else ""
        _tell(f"{name}: the run saves and exits as soon as it can{again}")
    elif not _has_reported_repeat:
        _has_reported_repeat = True
        _tell(f"a second signal ({name}) is the same request: the save continues")


def _restore(entry: tuple[int, Any]) -> None:
    number, handler = entry
    signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


def _tell(message: str) -> None:
    """Write a line to stderr, on the main rank; the stream's own lock may be held by what was interrupted."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"{message}\n".encode())


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
