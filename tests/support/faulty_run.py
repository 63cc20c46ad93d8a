"""A command in which one rank meets a fault in a phase; as a script under torchrun one rank of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FAULT_AT = 2
"""The phase is hit when it begins for this time: the run has got on before."""


def _raise(error: Exception) -> None:
    raise error


def _out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("injected: out of memory")


FAULTS = {
    "exception": lambda: _raise(RuntimeError("injected: a bug")),
    "bad value": lambda: _raise(ValueError("injected: a value of the user's")),
    "disk full": lambda: _raise(OSError(28, "No space left on device")),
    "out of memory": _out_of_memory,
    "exit": lambda: os._exit(5),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": lambda: os.kill(os.getpid(), signal.SIGABRT),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "slow": lambda: time.sleep(2),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}


class Trap(list):
    """The open spans of a rank, one of which springs a fault when it opens."""

    def __init__(self, kind: str, phase: str) -> None:
        super().__init__()
        self._kind, self._phase, self._num_left = kind, phase, FAULT_AT

    def append(self, name: str) -> None:
        """Open a span."""
        super().append(name)
        if name == self._phase:
            self._num_left -= 1
            if self._num_left == 0:
                sys.stderr.write(f"fault at {time.time()}\n")
                sys.stderr.flush()
                FAULTS[self._kind]()


def run_with_fault(kind: str, phase: str, rank: int, line: list[str], this_rank: int) -> int:
    """Return the exit code of a command in which `rank` meets a fault."""
    from glm_rlhf.engine.cli import main
    from glm_rlhf.parallel import spans

    if this_rank == rank:
        spans._open = Trap(kind, phase)
    try:
        return main(line)
    finally:
        spans._open = []


def launch(
    kind: str, phase: str, rank: int, line: list[str], *, timeout_s: float, num_restarts: int = 0
) -> tuple[int, str, float]:
    """Return exit code, stderr, and seconds from the fault to the end, of two ranks under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun.append(f"--max-restarts={num_restarts}")
    process = subprocess.Popen(
        [*torchrun, __file__, kind, phase, str(rank), *line],
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
    at = next((float(one.split()[-1]) for one in said.splitlines() if one.startswith("fault at ")), None)
    return process.returncode, said, float("nan") if at is None else time.time() - at


if __name__ == "__main__":
    kind_, phase_, rank_, *line_ = sys.argv[1:]
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        phase_ = "no phase"  # a restarted rank meets no fault
    sys.exit(run_with_fault(kind_, phase_, int(rank_), line_, int(os.environ["RANK"])))
