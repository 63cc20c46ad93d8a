"""Ends a rank that makes no progress, after reporting where it hangs."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from glm_rlhf.engine.health.stopped_ranks import kill_stopped, rank_processes
from glm_rlhf.parallel.runtime.log import log_rank
from glm_rlhf.parallel.runtime.spans import open_spans, progress_time

HUNG = 124
"""Exit code of a rank that hung, as of timeout(1)."""
_GRACE_S = 5.0
_SUSPENDED_S = 5.0
"""Seconds by which the watchdog's thread is late where the process was suspended, not the machine busy."""


@contextlib.contextmanager
def watchdog(
    timeout_s: float | None, *, rank: int, end: Callable[[int], object] = os._exit
) -> Iterator[None]:
    """End this process if the main thread makes no progress; torchrun then ends the other ranks.

    Progress is the begin or end of a span, a micro-batch, or a round of generation. Before the end, stderr
    gets one line with the phase and the collective that the main thread waits in, if any, and the stacks of
    all threads. Stopped ranks (SIGSTOP) of this machine, for which this rank may have waited, are reported
    and killed: a launcher's SIGTERM does not end them. Every rank enters; process ids are gathered once.

    Time in which the watchdog's own thread did not run does not count: the job was suspended. Where Python
    itself is blocked by a foreign call that keeps its lock, the thread does not run either; then the stacks
    are written some seconds after the timeout, and the process is ended by the ranks that wait for it. The
    same stacks appear once when a job that was suspended for longer continues.

    Args:
        timeout_s: longest time without progress, in seconds; None: no watchdog.
        rank: of this process, for the line.
        end: called with the exit code to end the process.
    """
    if timeout_s is None:
        yield
        return
    processes = rank_processes()
    has_ended, main, entered = threading.Event(), threading.get_ident(), time.monotonic()

    def watch() -> None:
        interval_s = min(1.0, timeout_s / 4)
        woke = progress = entered
        suspended_s = 0.0
        while not has_ended.wait(interval_s):
            faulthandler.dump_traceback_later(timeout_s + _GRACE_S, file=sys.__stderr__)
            now, newest = time.monotonic(), max(progress_time(), entered)
            late_s, woke = now - woke - interval_s, now
            if newest != progress:
                progress, suspended_s = newest, 0.0
            if late_s > min(_SUSPENDED_S, timeout_s):
                suspended_s += min(late_s, now - progress)
                log_rank(f"did not run for {late_s:.0f} s (suspended?): this time does not count", rank)
            idle_s = now - progress - suspended_s
            if idle_s > timeout_s:
                position = _position(sys._current_frames()[main])
                phase = "/".join(open_spans()) or "none"
                log_rank(f"hung for {idle_s:.0f} s in phase {phase}: {position}", rank)
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                for stopped in kill_stopped(processes):
                    log_rank(f"rank {stopped} was stopped (SIGSTOP); it is killed", rank)
                end(HUNG)
                return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _position(frame: FrameType | None) -> str:
    """Return the collective that a stack is in, with its caller; outside of one the innermost line."""
    innermost, collective, caller = f"{frame.f_code.co_filename}:{frame.f_lineno}", None, None
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith("distributed_c10d.py") and name != "wrapper":
            collective, caller = name, None
        elif collective is not None and caller is None and "torch/distributed" not in file:
            caller = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    if collective is None:
        return f"in no collective, at {innermost}"
    return f"in the collective {collective}, called at {caller}"
