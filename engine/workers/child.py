"""What runs in a worker process: it takes calls one after the other until its parent is gone.

Imports the standard library alone; numpy only to seed it.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from types import FrameType, TracebackType

from glm_rlhf.engine.workers.messages import Call, Inbox, Raised, Setup, pack, unpack

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that a launcher or a terminal sends to all processes of a job; they do not end a worker."""

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    """Answer calls until the connection is closed.

    Args:
        descriptor: of the socket to the parent.
        parent: its process id.
    """
    _keep_through_signals()
    _end_with(parent)
    shows_stacks = sys.stderr is not None
    if shows_stacks:
        faulthandler.enable()
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    inbox = Inbox(connection)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        setup = unpack(inbox.receive())
        assert isinstance(setup, Setup)
        sys.argv = list(setup.argv)
        _seed(setup.seed)
        connection.sendall(pack(None))  # started: the time of the preparation begins
        next_call: Callable[[], object] = lambda: setup.preparation
        while True:
            if shows_stacks:
                faulthandler.dump_traceback_later(setup.timeout_s)
            answer = _answer_of(next_call)
            faulthandler.cancel_dump_traceback_later()
            connection.sendall(answer)
            next_call = partial(unpack, inbox.receive())


def _find(name: str) -> Callable[..., object]:
    module, _, function = name.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), function)
    return found


def _answer_of(next_call: Callable[[], object]) -> bytes:
    """Return the packed result of a call, or what it raised."""
    try:
        call = next_call()
        return pack(_find(call.function)(*call.arguments) if isinstance(call, Call) else None)
    except BaseException as error:  # SystemExit too: the worker stays
        return pack(_raised(error))
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # closed, or replaced by the function
                continue


def _raised(error: BaseException) -> Raised:
    try:
        message = str(error)
    except Exception:
        message = "(its text cannot be had)"
    text = getattr(error, "traceback_text", None)  # an error about another one has that one's
    if not isinstance(text, str):
        frames = _without_own_frames(error.__traceback__)
        text = "".join(traceback.format_exception(type(error), error, frames))
    return Raised(kind=type(error).__name__, message=message, traceback=text)


def _without_own_frames(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return frames


def _keep_through_signals() -> None:
    """Ignore `SIGNALS` here, but in no process that a function starts.

    A handler that does nothing is reset by exec, which an ignored signal is not, and by hand after a fork: a
    function may end its own processes by SIGTERM.
    """
    for number in SIGNALS:
        signal.signal(number, _do_nothing)
    os.register_at_fork(after_in_child=_reset_signals)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by the parent until now


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def _reset_signals() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is _do_nothing:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _end_with(parent: int) -> None:
    """On Linux, have the kernel end this process with its parent, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)


def _seed(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
