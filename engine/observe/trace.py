"""What each rank did when, for Perfetto or Chrome's `about:tracing`: `<run folder>/trace/rank_N.json`."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from glm_rlhf.parallel.spans import WAIT, recording

FOLDER = "trace"
_SHORTEST_WAIT_S = 20e-6  # shorter ones count, but are not written: there are thousands in a second


class Trace:
    """Owns a rank's file of spans, and the seconds that it waited since it was last asked.

    The file is an array of complete events, in microseconds of the wall clock, so that the files of ranks
    whose clocks agree lie over each other; a rank is a process there, and its waits are a thread of their
    own. A run that was killed leaves the array open, which both viewers take.
    """

    def __init__(self, path: Path, *, rank: int) -> None:
        """Begin the file.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._rank = rank
        self._offset_s = time.time() - time.perf_counter()
        self._events: list[tuple[str, float, float]] = []
        self._waited_s = 0.0
        names = [("process_name", 0, f"rank {rank}"), ("thread_name", 0, "work"), ("thread_name", 1, WAIT)]
        lines = [
            {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}
            for kind, thread, name in names
        ]
        self._file.write("[\n" + ",\n".join(map(json.dumps, lines)))

    def take_wait_s(self) -> float:
        """Return the seconds waited since the last call, and write the spans so far."""
        waited_s, self._waited_s = self._waited_s, 0.0
        self._flush()
        return waited_s

    def close(self) -> None:
        """End the file."""
        self._flush()
        self._file.write("\n]\n")
        self._file.close()

    def record(self, name: str, start: float, end: float) -> None:
        """Take one span, in seconds of `time.perf_counter`."""
        if name == WAIT:
            self._waited_s += end - start
            if end - start < _SHORTEST_WAIT_S:
                return
        self._events.append((name, start, end))

    def _flush(self) -> None:
        for name, start, end in self._events:
            event = {
                "name": name,
                "ph": "X",
                "ts": round((start + self._offset_s) * 1e6, 1),
                "dur": round((end - start) * 1e6, 1),
                "pid": self._rank,
                "tid": int(name == WAIT),
            }
            self._file.write(",\n" + json.dumps(event))
        self._events.clear()
        self._file.flush()


@contextlib.contextmanager
def tracing(run_folder: str | Path, *, rank: int) -> Iterator[Trace]:
    """Return, as a context manager, the trace of this rank, which records while the block runs.

    Raises:
        OSError: the file cannot be written.
    """
    trace = Trace(Path(run_folder) / FOLDER / f"rank_{rank}.json", rank=rank)
    try:
        with recording(trace.record):
            yield trace
    finally:
        trace.close()
