"""One writer per folder or file: a lock that names its holder, and that ends with the holder's process."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

WAIT_S = 90.0
"""Longest wait for a holder that is about to end, in seconds."""
_POLL_S = 0.2
_READ_BYTES = 4096
_log = logging.getLogger(__name__)
_HELD = (errno.EAGAIN, errno.EACCES)
"""What a file system answers where another process has the lock; over NFS the second."""


class WriterError(ValueError):
    """Another process writes to this place; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockHolder:
    """The process that has a lock, as its file tells others."""

    host: str
    """Name of its machine."""
    pid: int
    """Its number there."""
    since: str
    """Local time at which it took the lock."""
    launcher: int | None
    """Number of the torchrun that started it; None without."""

    def describe(self) -> str:
        """Return it for a message."""
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def one_writer(target: str | Path, *, is_inside: bool = False, wait_s: float = WAIT_S) -> Iterator[bool]:
    """Hold the lock of a folder or file during the block; one process of a run calls this.

    The lock is `flock` on a file that is removed at the end: `<target>/.lock`, or `.<name>.lock` next to the
    target. It is released by any end of the process, a kill too, so that a file that is left over locks
    nothing. Over NFS version 4 it holds between machines.

    A holder that is about to end is waited for: ranks before a restart by torchrun, and ranks on this machine
    whose torchrun was killed. Any other one is an error at once.

    Args:
        target: what is written.
        is_inside: whether the lock's file is in the target, an existing folder, and not next to it.
        wait_s: longest wait, in seconds.

    Yields:
        Whether the lock is held; false, with a line for the user, where the file system has no locks.

    Raises:
        WriterError: another process holds it.
        OSError: the lock's file cannot be made.
    """
    target = Path(target)
    path = target / ".lock" if is_inside else target.with_name(f".{target.name}.lock")
    descriptor = _acquire(path, target, wait_s)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # the folder is gone, or became read-only
                path.unlink()
            os.close(descriptor)


def _acquire(path: Path, target: Path, wait_s: float) -> int | None:
    """Return the descriptor that holds the lock; None where there are no locks."""
    deadline: float | None = None
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                _write_holder(descriptor)
                return descriptor
            os.close(descriptor)  # its holder removed the file as it ended
            continue
        except OSError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if error.errno not in _HELD:
                _log.warning(
                    "%s: no file locks here (%s), so that a second run that writes to %s is not refused",
                    *(target.parent, error.strerror, target),
                )
                return None
        who = holder.describe() if holder is not None else "another process"
        if deadline is None:
            waits = holder is not None and _is_about_to_end(holder)
            deadline = time.monotonic() + (wait_s if waits else 0.0)
            if waits:
                _log.warning(
                    "%s is still written by %s, which is about to end: waiting up to %g s",
                    target,
                    who,
                    wait_s,
                )
        if time.monotonic() >= deadline:
            raise WriterError(
                f"{target} is being written by {who}: wait for its end, or write to another place"
            )
        time.sleep(_POLL_S)


def _open(path: Path) -> int:
    """Return a descriptor of the lock's file, which is made where it is missing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WriterError(f"{path} is not a regular file, a lock needs one: remove it")
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = LockHolder(host=socket.gethostname(), pid=os.getpid(), since=since, launcher=launcher)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode() + b"\n", 0)


def _read_holder(descriptor: int) -> LockHolder | None:
    """Return what the lock's file tells; None where it tells nothing, such as at the moment of its making."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        holder = LockHolder(**json.loads(os.pread(descriptor, _READ_BYTES, 0)))
        if isinstance(holder.pid, int) and holder.pid > 0:
            return holder
    return None


def _is_about_to_end(holder: LockHolder) -> bool:
    """Return whether a holder is a rank that torchrun replaces, or that lost its torchrun."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    if restarts.isdecimal() and int(restarts) > 0:
        return True
    if holder.launcher is None or holder.host != socket.gethostname():
        return False
    try:
        return psutil.Process(holder.pid).ppid() != holder.launcher
    except psutil.Error:
        return True
