"""Saves killed by SIGKILL at seeded system calls; run as a script: `FOLDER NUM_KILLS`.

The process only imports, so that it can fork: each child saves step 4 into a copy of FOLDER. The first one is
not killed; the kills of the others are sampled from the moments before and after each of its calls, always
with the rename of the folder and the replacement of the tracker. The result is printed as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401, what torch's optimizers load when one is made: a second of each child
from saved_runs import tiny_run
from watched_calls import CallLog

WATCHED = ("pwrite", "fsync", "rename", "replace")
"""Calls that change what a kill leaves behind."""
TIMEOUT_S = 120.0


def watch(log: Path, kill_at: int | None) -> None:
    """Record each watched call; die before call n if `kill_at` is 2 n, just after it if 2 n + 1."""
    calls = CallLog(log, kill_at)
    for name in WATCHED:
        setattr(os, name, calls.watch(getattr(os, name), lambda *_, name=name: name))


def save_in_child(folder: Path, kill_at: int | None) -> None:
    """Fork a child that saves step 4, and wait for its end."""
    child = os.fork()
    if child == 0:
        watch(folder.with_suffix(".calls"), kill_at)
        with tiny_run(folder) as run:
            run.save(4)
        os._exit(0)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(f"the child that was to die at {kill_at} hung")
        time.sleep(0.005)
    assert os.WIFSIGNALED(status) == (kill_at is not None), (kill_at, status)


def main(source: Path, num_kills: int) -> None:
    """Write `source.name + _MOMENT` next to the folder for each moment."""
    whole = source.with_name(f"{source.name}_whole")
    shutil.copytree(source, whole)
    save_in_child(whole, None)
    calls = whole.with_suffix(".calls").read_text().split()
    moments = [2 * calls.index(name) + after for name in ("rename", "replace") for after in (0, 1)]
    others = [moment for moment in range(2 * len(calls)) if moment not in moments]
    moments += random.Random(5).sample(others, num_kills - len(moments))
    for moment in moments:
        folder = source.with_name(f"{source.name}_{moment}")
        shutil.copytree(source, folder)
        save_in_child(folder, moment)
    sys.stdout.write(json.dumps({"calls": calls, "moments": moments}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
