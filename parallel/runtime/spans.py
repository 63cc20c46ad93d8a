"""Named, timed spans of this rank's work, passed to a recorder if there is one.

The open spans, and the time at which the last one began or ended, are known at any time: the watchdog and
error messages use them. With a recorder, waits for other ranks are spans too, named `wait`: the time of the
host in `Work.wait` of torch.distributed, which ends every synchronous collective, object collective, barrier,
and pipeline send or receive. On a CPU this is the wait for the other ranks plus the transfer; on CUDA a wait
does not block the host and is not recorded.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from glm_rlhf.parallel.megatron_compat.timed_waits import around_waits

WAIT = "wait"

Recorder = Callable[[str, float, float], None]
"""Called with a span's name, and its begin and end in seconds of `time.perf_counter`."""

_recorder: Recorder | None = None
_open: list[str] = []
_progress_time = time.monotonic()
_main_thread = threading.main_thread()


def open_spans() -> tuple[str, ...]:
    """Return the names of the main thread's open spans, outermost first."""
    return tuple(_open)


def progress_time() -> float:
    """Return the time of this rank's last progress, in seconds of `time.monotonic`."""
    return _progress_time


def heartbeat() -> None:
    """Record progress within a span."""
    global _progress_time
    _progress_time = time.monotonic()


def phase_of(error: BaseException) -> str:
    """Return the spans, outermost first, in which an exception was raised; empty if there were none."""
    return getattr(error, "_spans", "")


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Run a block as a span; a block that raises is not recorded."""
    is_main = threading.current_thread() is _main_thread
    if is_main:
        _open.append(name)
        heartbeat()
    start = time.perf_counter()
    try:
        yield
    except BaseException as error:
        if is_main and not phase_of(error):
            error._spans = "/".join(_open)
        raise
    finally:
        if is_main:
            _open.pop()
            heartbeat()
    if _recorder is not None:
        _recorder(name, start, time.perf_counter())


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Pass the spans and waits of this process to a recorder during the block.

    Raises:
        RuntimeError: another recorder is active.
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("spans are already recorded: one recorder at a time")
    _recorder = recorder
    try:
        with around_waits(partial(span, WAIT)):
            yield
    finally:
        _recorder = None
