"""Ends a rank whose torchrun was killed, before it meets its successors. Imports no torch."""

import os
import signal
import threading
import time
from collections.abc import Callable

from glm_rlhf.parallel.runtime.launch import is_under_torchrun, read_launch
from glm_rlhf.parallel.runtime.log import log_rank

POLL_S = 2.0
"""Seconds between two looks at the parent process."""
GRACE_S = 45.0
"""Seconds that an orphan has to save before it is ended."""
_watched_pid: int | None = None


def watch_launcher() -> None:
    """End this process soon after the torchrun that started it, for the rest of its life; may be repeated.

    A thread looks at the parent process. When it has gone, this process gets SIGTERM, which asks for a save
    where signals are handled and ends it where they are not, and is ended `GRACE_S` later. Does nothing
    without torchrun: the parent may then be a shell that was closed on purpose.
    """
    global _watched_pid
    if not is_under_torchrun() or _watched_pid == os.getpid():  # a fork has no threads
        return
    _watched_pid = os.getpid()
    options = {"parent": os.getppid(), "rank": read_launch().rank}
    threading.Thread(target=end_orphan, kwargs=options, name="launcher", daemon=True).start()


def end_orphan(
    *,
    parent: int,
    rank: int,
    poll_s: float = POLL_S,
    grace_s: float = GRACE_S,
    end: Callable[[int], object] = os._exit,
) -> None:
    """Wait until this process has another parent, then ask it to end, and end it.

    Args:
        parent: process id of its first parent.
        rank: of this process, for the message.
        poll_s: seconds between two looks.
        grace_s: seconds from the request to the end.
        end: called with the exit code to end the process.
    """
    while os.getppid() == parent:
        time.sleep(poll_s)
    log_rank("torchrun has ended without its ranks: this one saves if it can, and exits", rank)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    log_rank(f"still running {grace_s:g} s after torchrun has ended: it exits without a save", rank)
    end(1)
