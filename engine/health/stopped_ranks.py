"""Stopped ranks (SIGSTOP): alive, but running no signal handler and no watchdog until SIGCONT.

torchrun ends ranks by SIGTERM, which a stopped process does not handle, and kills them 30 s later. A running
rank of the same machine can kill them at once.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

_STOPPED = "T"  # by a signal; "t" is a debugger's
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """The process of a rank, identified beyond reuse of its pid."""

    rank: int
    """In the world."""
    pid: int
    """In its pid namespace."""
    host: str
    """Boot id of the machine and pid namespace: a pid is unique within it."""
    start_ticks: int
    """Start time; a later process with the same pid has another."""


def rank_processes() -> tuple[RankProcess, ...]:
    """Return the processes of the ranks on this machine, this one included; every rank calls this.

    The world gathers a few bytes. Empty without a process group and where there is no /proc.
    """
    if not dist.is_initialized():
        return ()
    mine = None
    if _BOOT.exists():
        pid, host = os.getpid(), f"{_BOOT.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        _, start_ticks = _state_and_start(pid)
        mine = RankProcess(rank=dist.get_rank(), pid=pid, host=host, start_ticks=start_ticks)
    gathered: list[RankProcess | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if mine is None:
        return ()
    return tuple(process for process in gathered if process is not None and process.host == mine.host)


def kill_stopped(processes: Sequence[RankProcess]) -> list[int]:
    """Kill those of the ranks that are stopped now; return their numbers.

    Args:
        processes: as returned by `rank_processes`; they may have ended since.
    """
    killed = []
    for process in processes:
        try:
            descriptor = os.pidfd_open(process.pid)  # from here on it cannot mean another process
        except OSError:
            continue
        try:
            if _state_and_start(process.pid) == (_STOPPED, process.start_ticks):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                killed.append(process.rank)
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return killed


def _state_and_start(pid: int) -> tuple[str, int]:
    """Return the state of a process, a letter, and its start time in clock ticks since boot."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold ") "
    return fields[0], int(fields[19])
