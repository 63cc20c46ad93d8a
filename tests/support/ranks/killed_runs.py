"""Commands of one process, killed by SIGKILL at changes of names, or met by a second one of their kind.

Run as a script: `FILE`, the name of a JSON file with a list of requests `[kind, line, value, log]`. The
process only imports, so that it can fork: each command runs in a child. The answers are printed as JSON.

- `run`: value is null; the answer is the exit code.
- `kill`: value is the moment: 2 n before the n-th change of a name, 2 n + 1 after it; the answer is whether
  the command died by it. With a moment of -1 nothing is killed; the answer is the list of changes.
- `kill in two steps`: the same where the system cannot exchange two names.
- `pair`: the command is held when it has the lock of value, and runs once more meanwhile; the answer is the
  exit code of both, what the second one said, and the number of the first one's process.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401, what torch's optimizers load when one is made
from watched_calls import CallLog

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.commands import convert, evaluate, generate, label, ppo, score, sft  # noqa: F401
from glm_rlhf.parallel.storage import durable_io, writer_lock

TIMEOUT_S = 200.0


def watch(log: Path, kill_at: int, *, can_exchange: bool) -> None:
    """Record each change of a name; die before or after one of them."""
    calls = CallLog(log, kill_at)

    def watched(name, original):
        return calls.watch(original, lambda *args: f"{name} {Path(args[-1]).name}")

    exchange = durable_io._exchange if can_exchange else lambda *_: False
    durable_io._exchange = watched("exchange", exchange) if can_exchange else exchange
    for name in ("rename", "replace"):
        setattr(os, name, watched(name, getattr(os, name)))


def start(line: list[str], prepare=lambda: None) -> int:
    """Fork a child that runs a command; return its number."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            prepare()
            code = main(line)
        os._exit(code)
    return child


def wait(child: int) -> int:
    """Return the status of a child's end."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(f"child {child} hung")
        time.sleep(0.005)


def kill(line: list[str], moment: int, log: Path, *, can_exchange: bool) -> bool | list[str]:
    """Run a command to the moment of its kill; return whether it died, or the changes that it made."""
    code = wait(start(line, lambda: watch(log, moment, can_exchange=can_exchange)))
    if moment < 0:
        assert code == 0, code
        return log.read_text().splitlines()
    return code == -signal.SIGKILL


def pair(line: list[str], target: str, log: Path) -> list:
    """Hold a command at a lock, and run it again meanwhile; return both codes and what the second said."""
    held, freed = log.with_suffix(".held"), log.with_suffix(".freed")

    def hold_at_lock() -> None:
        original = writer_lock._acquire

        def acquire(path, target_of_lock, wait_s):
            descriptor = original(path, target_of_lock, wait_s)
            if str(target_of_lock) == target:
                held.touch()
                deadline = time.monotonic() + TIMEOUT_S / 2
                while not freed.exists() and time.monotonic() < deadline:
                    time.sleep(0.005)
            return descriptor

        writer_lock._acquire = acquire

    def speak_into_log() -> None:
        sys.stderr = log.open("w")

    first = start(line, hold_at_lock)
    deadline = time.monotonic() + TIMEOUT_S / 2
    while not held.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    second = wait(start(line, speak_into_log))
    freed.touch()
    return [wait(first), second, log.read_text(), first]


def answer(kind: str, line: list[str], value, log: Path):
    """Return the answer to one request."""
    if kind == "run":
        return wait(start(line))
    if kind == "pair":
        return pair(line, value, log)
    return kill(line, value, log, can_exchange=kind == "kill")


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        answers = [
            answer(kind_, line_, value_, Path(log_))
            for kind_, line_, value_, log_ in json.loads(Path(sys.argv[1]).read_text())
        ]
    sys.stdout.write(json.dumps(answers))
