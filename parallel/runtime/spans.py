"""What this rank does from when to when, told to a recorder while there is one.

Which spans are open, and when the last one began or ended, is known at any time: a watchdog and messages of
faults name them. With a recorder, the rank's waits for others are spans too, named
`wait`: the time that the host stands in `Work.wait` of torch.distributed, in which every synchronous
collective, object collective and barrier ends, and every send and receive of the pipeline. On a CPU that is
the wait for the other ranks together with the transfer; on CUDA a wait does not hold the host, and is not
seen.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from glm_rlhf.parallel.megatron_compat.timed_waits import around_waits

WAIT = "wait"

Recorder = Callable[[str, float, float], None]
"""Takes a span's name, and its begin and end in seconds of `time.perf_counter`."""

_recorder: Recorder | None = None
_open: list[str] = []
_progress_time = time.monotonic()
_main_thread = threading.main_thread()


def open_spans() -> tuple[str, ...]:
    """Return the names of the spans that the main thread is in, outermost first."""
    return tuple(_open)


def progress_time() -> float:
    """Return when this rank last got on, in seconds of `time.monotonic`."""
    return _progress_time


def heartbeat() -> None:
    """Say that this rank gets on, in the middle of a span."""
    global _progress_time
    _progress_time = time.monotonic()


def phase_of(error: BaseException) -> str:
    """Return the spans, outermost first, in which an exception was raised; empty where it was in none."""
    return getattr(error, "_spans", "")


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Run a block as a span; for a recorder one that raises is none."""
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
    """Tell a recorder the spans and waits of this process while the block runs.

    Raises:
        RuntimeError: there is a recorder already.
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("spans are recorded already: one recorder at a time")
    _recorder = recorder
    try:
        with around_waits(partial(span, WAIT)):
            yield
    finally:
        _recorder = None
