"""A command with a fault on one rank in one phase: the faults, and how they are injected.

As a script under torchrun it is one rank of such a command.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NO_PHASE = "no phase"
_lasting = contextlib.ExitStack()


def _raise(error: Exception) -> None:
    raise error


def _out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("injected: out of memory")


def _little_memory() -> None:
    """Leave memory only for the shortest micro-batches from now on."""
    from little_memory import little_memory

    _lasting.enter_context(little_memory(None, 30))


def _slow_disk() -> None:
    """Make each sync to the disk take longer from now on."""
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.2), fsync(descriptor))[1]


def _flip_a_byte() -> None:
    """Damage the newest checkpoint of the run, and exit."""
    output = next(one.partition("=")[2] for one in sys.argv if one.startswith("run.output="))
    newest = max((Path(output) / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name[5:]))
    largest = max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.kill(os.getpid(), signal.SIGKILL)


def _nan() -> None:
    """Make the critic's next loss NaN."""
    from glm_rlhf.engine.rl.algorithms import ppo

    original = ppo.ppo_value_loss

    def broken(*args, **options):
        ppo.ppo_value_loss = original
        loss, statistics = original(*args, **options)
        return loss * float("nan"), type(statistics)(sums=statistics.sums * float("nan"))

    ppo.ppo_value_loss = broken


def _lose_reward_server() -> None:
    """Make every connection fail from now on."""
    from glm_rlhf.engine.rewards import bounded_post

    def refuse(*_args, **_options):
        raise ConnectionRefusedError(111, "Connection refused")

    bounded_post.post = refuse


SUSPENSION_S = 7.0
_SUSPEND = f"""
import os, signal, sys, time
group = int(sys.argv[1])
os.killpg(group, signal.SIGSTOP)
time.sleep({SUSPENSION_S})
os.killpg(group, signal.SIGCONT)
"""


def _suspend_job() -> None:
    """Stop all ranks and their launcher, as a batch system suspends a job, and let them continue later."""
    command = [sys.executable, "-c", _SUSPEND, str(os.getpgrp())]
    subprocess.Popen(command, start_new_session=True)
    time.sleep(2)  # in which the stop comes


FAULTS: dict[str, Callable[[], object]] = {
    "exception": lambda: _raise(RuntimeError("injected: a bug")),
    "bad value": lambda: _raise(ValueError("injected: a value of the user's")),
    "disk full": lambda: _raise(OSError(28, "No space left on device")),
    "slow disk": _slow_disk,
    "corrupt file": _flip_a_byte,
    "out of memory": _out_of_memory,
    "little memory": _little_memory,
    "NaN": _nan,
    "lost reward server": _lose_reward_server,
    "exit": lambda: os._exit(5),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": lambda: os.kill(os.getpid(), signal.SIGABRT),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "slow": lambda: time.sleep(2),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM to the job": lambda: os.killpg(os.getpgrp(), signal.SIGTERM),
    "lost launcher": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "suspended job": _suspend_job,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault of one rank, and its time."""

    kind: str = "slow"
    """Of `FAULTS`."""
    phase: str = NO_PHASE
    """A span; the fault occurs when it begins."""
    rank: int = 0
    """The failing rank."""
    time: int = 2
    """Which occurrence of the phase; before the second one the run has made progress."""


class Trap(list):
    """The open spans of a rank, one of which triggers a fault when it opens."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault, self._num_left = fault, fault.time

    def append(self, name: str) -> None:
        """Open a span."""
        super().append(name)
        if name == self._fault.phase:
            self._num_left -= 1
            if self._num_left == 0:
                sys.stderr.write(f"fault at {time.time()}\n")
                sys.stderr.flush()
                FAULTS[self._fault.kind]()


def run_with_fault(fault: Fault, line: list[str], this_rank: int) -> int:
    """Return the exit code of a command with a fault on one rank; a restarted rank has none."""
    from glm_rlhf.engine.cli import main
    from glm_rlhf.parallel.runtime import spans

    if this_rank == fault.rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        spans._open = Trap(fault)
    try:
        return main(line)
    finally:
        spans._open = []


def seconds_since_fault(said: str) -> float:
    """Return the seconds since the fault that stderr reports; NaN if it reports none."""
    at = next((float(one.split()[-1]) for one in said.splitlines() if one.startswith("fault at ")), None)
    return float("nan") if at is None else time.time() - at


def launch(fault: Fault, line: list[str], *, timeout_s: float) -> tuple[int, str, float]:
    """Return exit code, stderr, and seconds from the fault to the end, of two ranks under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [fault.kind, fault.phase, str(fault.rank), str(fault.time)]
    process = subprocess.Popen(
        [*torchrun, __file__, *arguments, *line],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    try:
        _, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, said, seconds_since_fault(said)


if __name__ == "__main__":
    kind_, phase_, rank_, time_, *line_ = sys.argv[1:]
    fault_ = Fault(kind=kind_, phase=phase_, rank=int(rank_), time=int(time_))
    sys.exit(run_with_fault(fault_, line_, int(os.environ["RANK"])))
