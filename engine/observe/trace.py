"""A rank's timeline for Perfetto or Chrome's `about:tracing`: `<run folder>/trace/rank_N.json`."""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from glm_rlhf.engine.observe.best_effort import GrowingFile
from glm_rlhf.parallel.runtime.spans import WAIT, recording

FOLDER = "trace"
_SHORTEST_WAIT_S = 20e-6  # shorter waits count but are not written: there are thousands per second


class Trace:
    """Owns a rank's trace file, and the seconds waited since the last `take_wait_s`.

    The file is an array of complete events in microseconds of the wall clock, so that the timelines of ranks
    with synchronised clocks align. A rank is a process of the trace; its waits are one thread, and each
    background thread is another. A killed run or a full disk leaves the array open, which both viewers
    accept.
    """

    def __init__(self, path: Path, *, rank: int) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = GrowingFile(path)
        self._rank = rank
        self._offset_s = time.time() - time.perf_counter()
        self._events: deque[tuple[str, float, float, str]] = deque()  # background threads add to it
        self._threads: dict[str, int] = {threading.main_thread().name: 0}
        self._waited_s = 0.0
        names = [("process_name", 0, f"rank {rank}"), ("thread_name", 0, "work"), ("thread_name", 1, WAIT)]
        self._file.append("[\n" + ",\n".join(json.dumps(self._name_event(*name)) for name in names))

    def take_wait_s(self) -> float:
        """Return the seconds waited since the last call, and write the spans recorded so far."""
        waited_s, self._waited_s = self._waited_s, 0.0
        self._flush()
        return waited_s

    def close(self) -> None:
        """Write the rest and close the file."""
        self._flush()
        self._file.append("\n]\n")
        self._file.close()

    def record(self, name: str, start: float, end: float) -> None:
        """Record one span, from `start` to `end` in seconds of `time.perf_counter`."""
        if name == WAIT:
            self._waited_s += end - start
            if end - start < _SHORTEST_WAIT_S:
                return
        self._events.append((name, start, end, threading.current_thread().name))

    def _name_event(self, kind: str, thread: int, name: str) -> dict[str, object]:
        return {"name": kind, "ph": "M", "pid": self._rank, "tid": thread, "args": {"name": name}}

    def _flush(self) -> None:
        written = []
        while self._events:
            name, start, end, thread = self._events.popleft()
            if thread not in self._threads:
                self._threads[thread] = len(self._threads) + 1  # 1 is the thread of waits
                name_event = self._name_event("thread_name", self._threads[thread], thread)
                written.append(",\n" + json.dumps(name_event))
            event = {
                "name": name,
                "ph": "X",
                "ts": round((start + self._offset_s) * 1e6, 1),
                "dur": round((end - start) * 1e6, 1),
                "pid": self._rank,
                "tid": 1 if name == WAIT else self._threads[thread],
            }
            written.append(",\n" + json.dumps(event))
        if written:
            self._file.append("".join(written))


@contextlib.contextmanager
def tracing(run_folder: str | Path, *, rank: int) -> Iterator[Trace]:
    """Return, as a context manager, the trace of this rank, which records during the block.

    Raises:
        OSError: the file cannot be written.
    """
    trace = Trace(Path(run_folder) / FOLDER / f"rank_{rank}.json", rank=rank)
    try:
        with recording(trace.record):
            yield trace
    finally:
        trace.close()
