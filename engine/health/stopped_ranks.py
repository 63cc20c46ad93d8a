"""Ranks that somebody stopped: alive, but they run no handler and no watchdog until they go on.

torchrun asks a rank to end by SIGTERM, which waits for a stopped process, and kills 30 s later. A rank of the
same machine that is not stopped can do it at once.
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
    """The process of a rank, so that no other one is taken for it."""

    rank: int
    """In the world."""
    pid: int
    """As its machine, or container, counts."""
    host: str
    """Where processes are counted: the machine since it was started, and the container."""
    start_ticks: int
    """When it was started: a number that is used again has another."""


def rank_processes() -> tuple[RankProcess, ...]:
    """Return the processes of the ranks on this machine, this one among them; every rank calls this.

    A few bytes are gathered in the world. None without a process group, and where there is no /proc.
    """
    if not dist.is_initialized():
        return ()
    own = None
    if _BOOT.exists():
        pid, place = os.getpid(), f"{_BOOT.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        _, start_ticks = _state_and_start(pid)
        own = RankProcess(rank=dist.get_rank(), pid=pid, host=place, start_ticks=start_ticks)
    found: list[RankProcess | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return tuple(one for one in found if one is not None and own is not None and one.host == own.host)


def kill_stopped(processes: Sequence[RankProcess]) -> list[int]:
    """Kill those of the ranks that are stopped; return which they were.

    Args:
        processes: as `rank_processes` returned them, in whatever state they are by now.
    """
    killed = []
    for process in processes:
        try:
            descriptor = os.pidfd_open(process.pid)  # from here on nobody else is meant by it
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
    """Return a process's state, a letter, and when it was started, in ticks since its machine was."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # names hold anything
    return fields[0], int(fields[19])
