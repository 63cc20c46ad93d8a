"""What this rank does from when to when, told to a recorder while there is one.

Without a recorder a span costs a comparison. With one, the rank's waits for others are spans too, named
`wait`: the time that the host stands in `Work.wait` of torch.distributed, in which every synchronous
collective, object collective and barrier ends, and every send and receive of the pipeline. On a CPU that is
the wait for the other ranks together with the transfer; on CUDA a wait does not hold the host, and is not
seen.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import Work

WAIT = "wait"

Recorder = Callable[[str, float, float], None]
"""Takes a span's name, and its begin and end in seconds of `time.perf_counter`."""

_recorder: Recorder | None = None


def is_recording() -> bool:
    """Return whether there is a recorder."""
    return _recorder is not None


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Run a block as a span; one that raises is none."""
    if _recorder is None:
        yield
        return
    start = time.perf_counter()
    yield
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
    wait = Work.wait

    def timed_wait(work: Work, *args: Any, **options: Any) -> Any:
        with span(WAIT):
            return wait(work, *args, **options)

    _recorder, Work.wait = recorder, timed_wait
    try:
        yield
    finally:
        _recorder, Work.wait = None, wait
