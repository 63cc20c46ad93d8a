"""Four ranks that stay alive over many tests, because starting them costs more than most tests.

Run as a script it is one rank: it joins the world over a file, then runs the functions that the pool sends,
each named by its file.
"""

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

WORLD_SIZE = 4
TIMEOUT_S = 300.0


class RankError(AssertionError):
    """A function failed on some rank; the message holds every rank's traceback."""


class RankPool:
    """Owns the rank processes; a failed or hung call ends them, the next one starts new ones."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, function, *args, timeout_s: float = TIMEOUT_S) -> list:
        """Return what `function(*args)` returns on each rank, rank by rank.

        Args:
            function: defined at the top of its module; arguments and result can be pickled.

        Raises:
            RankError: it raised on a rank, or was not done after `timeout_s`.
        """
        if not self._processes:
            self._start()
        path = sys.modules[function.__module__].__file__
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((path, function.__qualname__, args)))
        try:
            answers = self._collect(timeout_s)
        except BaseException:  # interrupted: late answers must not reach the next call
            self.close()
            raise
        failures = [f"rank {rank}: {answer[1]}" for rank, answer in enumerate(answers) if answer[0] != "ok"]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [answer[1] for answer in answers]

    def close(self) -> None:
        """End every rank at once."""
        for process in self._processes:
            process.kill()
            process.wait()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        address = str(Path(self._folder.name) / "socket")
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        paths = os.pathsep.join(path for path in sys.path if path)  # modules of tests/support
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with Listener(address, "AF_UNIX", backlog=WORLD_SIZE) as listener:
            for rank in range(WORLD_SIZE):
                command = [sys.executable, __file__, address, rendezvous, str(rank)]
                self._processes.append(subprocess.Popen(command, env=environment))
            by_rank = {}
            for _ in range(WORLD_SIZE):
                connection = listener.accept()
                by_rank[connection.recv()] = connection
        self._connections = [by_rank[rank] for rank in range(WORLD_SIZE)]

    def _collect(self, timeout_s: float) -> list[tuple]:
        """Wait for all ranks; after a failure the others, probably waiting for it, get little time."""
        deadline = time.monotonic() + timeout_s
        answers: list[tuple | None] = [None] * WORLD_SIZE
        while None in answers and time.monotonic() < deadline:
            for rank, connection in enumerate(self._connections):
                if answers[rank] is None and connection.poll(0.005):
                    try:
                        answers[rank] = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        answers[rank] = ("error", "the process ended")
                    if answers[rank][0] != "ok":
                        deadline = min(deadline, time.monotonic() + 3.0)
        return [answer or ("error", "no answer in time (waiting for another rank?)") for answer in answers]


def _serve(address: str, rendezvous: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    modules = {}
    with Client(address, "AF_UNIX") as connection:
        connection.send(rank)
        with contextlib.suppress(EOFError):
            while True:
                # Not `recv`: with torch it shares the memory of tensors, which these processes cannot do.
                path, name, args = pickle.loads(connection.recv_bytes())
                try:
                    if path not in modules:
                        modules[path] = _load(path)
                    answer = pickle.dumps(("ok", getattr(modules[path], name)(*args)))
                except Exception:
                    answer = pickle.dumps(("error", traceback.format_exc()))
                connection.send_bytes(answer)


def _load(path: str):
    # Files of other folders share its stem.
    name = "on_ranks_" + "_".join(Path(path).with_suffix("").parts[1:])
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
