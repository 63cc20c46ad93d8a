"""A process that imports a tree once and forks the ranks of each run: `fork_server.py TREE`.

It runs alone, without this package, so that `glm_rlhf` is the tree's and nobody else's. Requests are JSON
lines on standard input, one answer each. Of the tree it knows `glm_rlhf.engine.cli.main` and nothing else:
what a run has imported is imported here after it, so that only the first run of its kind waits for that.
"""

import contextlib
import importlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from os import _exit as end_at_once
from pathlib import Path

MODULES = "modules.json"
GRACE_S = 5.0
"""Seconds that other ranks get to say why they fail, once one has failed."""


def serve(tree: Path) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    from glm_rlhf.engine.cli import main

    refuse_foreign_modules(tree)
    for line in sys.stdin:
        request = json.loads(line)
        if "help" in request:
            answer = _help(main, request["help"])
        else:
            answer = _run(main, tree, **request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def refuse_foreign_modules(tree: Path) -> None:
    """Raise RuntimeError where a module of `glm_rlhf` comes from another place than the tree."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith("glm_rlhf") and file and not Path(file).resolve().is_relative_to(tree.resolve()):
            raise RuntimeError(f"{name} is {Path(file).resolve()}, which is not in {tree.resolve()}")


def _help(main, command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = main([command, "--help"])
    return text.getvalue() if code == 0 else ""


def _run(main, tree: Path, argv: list[str], world: int, folder: str, timeout_s: float) -> list[int | None]:
    """Return the exit code of each rank of a command line, None where it had to be killed."""
    store, port = _fork_store()
    try:
        ranks = []
        for rank in range(world):
            child = os.fork()
            if not child:
                _become_rank(main, tree, argv, rank, world, port, Path(folder))
            ranks.append(child)
        codes = _wait(ranks, timeout_s)
    finally:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)
    with contextlib.suppress(OSError):
        _import(json.loads((Path(folder) / MODULES).read_text(encoding="utf-8")))
    return codes


def _fork_store() -> tuple[int, int]:
    """Return process and port of a store where the ranks meet, as torchrun's agent holds one.

    The system chooses the port, and it is bound at once: no other run can take it in between.
    """
    reader, writer = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        try:
            _hold_store(parent, writer)
        finally:
            end_at_once(1)
    os.close(writer)
    with os.fdopen(reader) as answer:
        return child, int(answer.read())


def _hold_store(parent: int, writer: int) -> None:
    """Tell the store's port, and hold it as long as the parent lives."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, str(store.port).encode())
    os.close(writer)
    while os.getppid() == parent:
        time.sleep(1)


def _become_rank(main, tree: Path, argv: list[str], rank: int, world: int, port: int, folder: Path) -> None:
    """Be one rank of a run, and end."""
    code = 1
    try:
        file = os.open(folder / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ |= {name: str(value) for name, value in environment.items()}
        _seed(rank)
        code = main(argv)
        refuse_foreign_modules(tree)
        if rank == 0:
            (folder / MODULES).write_text(json.dumps(list(sys.modules)), encoding="utf-8")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        end_at_once(code)


def _seed(rank: int) -> None:
    """Seed the generators that a run leaves to chance: their states stand in its checkpoints."""
    import numpy

    random.seed(rank)
    numpy.random.seed(rank)


def _wait(ranks: list[int], timeout_s: float) -> list[int | None]:
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(ranks) and time.monotonic() < deadline:
        for child in ranks:
            done, status = (0, 0) if child in codes else os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.01)
    for child in ranks:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [codes.get(child) for child in ranks]


def _import(modules: list[str]) -> None:
    """Import what a rank has imported, in its order."""
    for name in modules:
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # made by hand, such as torch.ops: nothing to import
                importlib.import_module(name)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
