"""Many faulty runs under torchrun's agent, each forked from one process that has imported everything.

Starting torchrun and its ranks costs more than a tiny run. The agent is torchrun's own, with its own
arguments; but its ranks are forked, where torchrun starts interpreters. Run as a script it answers requests
from standard input, one at a time.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faulty_run import Fault, run_with_fault, seconds_since_fault

TORCHRUN = ["--standalone", "--nproc-per-node=2", "--monitor-interval=0.1", "--start-method=fork"]


class WarmLaunches:
    """Owns the process that forks; used as a context manager."""

    def __enter__(self) -> "WarmLaunches":
        paths = [str(Path(__file__).parent), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(
        self, fault: Fault, line: list[str], *, timeout_s: float, num_restarts: int = 0
    ) -> tuple[int, str, float]:
        """Return exit code, stderr, and seconds from the fault to the end, of two ranks.

        Raises:
            TimeoutError: it did not end in time.
            AssertionError: a process is still running.
        """
        with tempfile.NamedTemporaryFile() as stderr:
            asked = [dataclasses.asdict(fault), line, timeout_s, num_restarts, stderr.name]
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            code, is_any_left = json.loads(self._process.stdout.readline())
            said = stderr.read().decode(errors="replace")
        if code is None:
            raise TimeoutError(f"still running after {timeout_s} s: {said}")
        assert not is_any_left, said
        return code, said, seconds_since_fault(said)


def _serve() -> None:
    # Imports that forks must not repeat; torch's optimizers load Dynamo when created.
    import torch._dynamo
    import torch.distributed.run  # noqa: F401

    import glm_rlhf.engine.commands.ppo  # noqa: F401

    for request in sys.stdin:
        fault, line, timeout_s, num_restarts, stderr = json.loads(request)
        child = os.fork()
        if not child:
            _become_agent(Fault(**fault), line, num_restarts, stderr)
        answer = _wait(child, time.monotonic() + timeout_s)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become_agent(fault: Fault, line: list[str], num_restarts: int, stderr: str) -> None:
    """Run as torchrun, and exit."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    os.setsid()
    for name, descriptor in ((stderr, 2), (os.devnull, 1), (os.devnull, 0)):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    sys.argv[1:] = line
    code = 1
    with contextlib.suppress(BaseException):
        try:
            args = run.parse_args([*TORCHRUN, f"--max-restarts={num_restarts}", __file__])
            args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(os.getpid())
            args.master_port = args.master_port or 29500
            config, *_ = run.config_from_args(args)
            elastic_launch(config, _be_rank)(fault, line)
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(code)


def _be_rank(fault: Fault, line: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # the agent's handlers
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    code = run_with_fault(fault, line, int(os.environ["RANK"]))
    os.write(2, f"rank {os.environ['RANK']} returned {code}\n".encode())
    if fault.kind == "SIGTERM to the job":  # a forked rank would wait until its agent takes its result
        os._exit(code)
    if code:
        sys.exit(code)


def _wait(child: int, deadline: float) -> tuple[int | None, bool]:
    """Return a child's exit code, None where it had to be killed, and whether it left others behind.

    Those that a child leaves behind that was killed itself have until the deadline.
    """
    code = None
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    while code == -signal.SIGKILL and _is_any_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    is_any_left = code != -signal.SIGKILL or _is_any_alive(child)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        is_any_left = False
    if code is None:
        os.waitpid(child, 0)
    return code, is_any_left


def _is_any_alive(group: int) -> bool:
    """Return whether a process group has a process that is no zombie."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = file.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                return True
    return False


if __name__ == "__main__":
    _serve()
