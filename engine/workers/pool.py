"""A pool of worker processes, each of which takes one call at a time."""

import contextlib
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Mapping

from glm_rlhf.engine.workers.messages import Call, Raised, Setup, pack, unpack
from glm_rlhf.engine.workers.process import Worker, WorkerDied

LAUNCH_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
)
"""Variables of torchrun that no worker has: a library in it would take itself for a rank."""
_LAUNCH_PREFIX = "TORCHELASTIC_"


class CallRaised(Exception):
    """A call that raised in its worker."""

    def __init__(self, raised: Raised) -> None:
        """Say what it raised; `raised` has the traceback too."""
        super().__init__(f"{raised.kind}: {raised.message}")
        self.raised = raised


class WorkerPool:
    """Owns worker processes and hands them calls; those that end or hang are replaced.

    Processes are spawned, not forked: they have none of this process's memory, threads, devices or process
    groups, and run no `__main__`. They have its working folder, `sys.path`, `sys.argv`, outputs, and its
    environment without torchrun's variables. Signals that a launcher sends to all processes of a job do not
    end them; they end with this process.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        timeout_s: float,
        seed: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start no process yet.

        Args:
            num_workers: processes, at least one.
            timeout_s: longest time of a call in seconds, once a process has it.
            seed: each worker's Python and numpy generators are seeded with this, its number, and how often it
                was replaced.
            environment: variables that differ from this process's.
        """
        assert num_workers > 0
        self.timeout_s = timeout_s
        self._seed = seed
        self._preparation: Call | None = None
        self._environment = worker_environment(os.environ) | dict(environment or {})
        self._num_started = [0] * num_workers
        self._workers: list[Worker | None] = [None] * num_workers
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self, preparation: Call | None = None) -> None:
        """Start all processes, and wait until one of them is prepared.

        Args:
            preparation: called in each process before its other calls; it has `timeout_s` too.

        Raises:
            CallRaised: the preparation raised.
            WorkerDied, WorkerTimeout: the process ended in it, or it took too long.
            OSError: no process can be started.
        """
        self._preparation = preparation
        for index in range(len(self._workers)):
            self._replace(index)
            self._idle.put(index)
        index = self._idle.get()
        try:
            self._prepared(index)
        finally:
            self._idle.put(index)

    def call(self, function: str, *arguments: object) -> object:
        """Return what a function returns in the next idle process; may be called by several threads.

        Args:
            function: `module:function`.
            arguments: pickled, as the result is.

        Raises:
            CallRaised: the function raised, its arguments or result cannot be pickled, or the preparation of
                a new process raised.
            WorkerDied: the process ended; another one takes its place.
            WorkerTimeout: the function took longer than `timeout_s`; its process is ended, and another one
                takes its place.
            OSError: no process can be started.
        """
        try:
            content = pack(Call(function=function, arguments=arguments))
        except Exception as error:
            raise _not_carried(error) from error
        index = self._idle.get()
        try:
            answer = self._prepared(index).ask(content)
        except BaseException:
            self._replace_if_ended(index)
            raise
        finally:
            self._idle.put(index)
        return _result(answer)

    def close(self) -> None:
        """End all processes; calls that are in one raise WorkerDied."""
        with self._lock:
            self._is_closed = True
            workers = [worker for worker in self._workers if worker is not None]
        threads = [threading.Thread(target=worker.close) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def process_ids(self) -> list[int]:
        """Return the ids of the processes."""
        return [worker.pid for worker in self._workers if worker is not None]

    def _prepared(self, index: int) -> Worker:
        worker = self._workers[index]
        if worker is None or not worker.is_alive:  # no process could be started, or it has ended while idle
            worker = self._replace(index)
        if not worker.is_ready:
            answer = worker.ask(None)
            try:
                _result(answer)
            except CallRaised:
                worker.close()
                raise
            worker.is_ready = True
        return worker

    def _replace_if_ended(self, index: int) -> None:
        worker = self._workers[index]
        if (worker is None or not worker.is_alive) and not self._is_closed:
            with contextlib.suppress(OSError):  # the next call tries again
                self._replace(index)

    def _replace(self, index: int) -> Worker:
        if self._is_closed:
            raise WorkerDied("was ended: its pool is closed")
        text = f"{self._seed} {index} {self._num_started[index]}"
        self._num_started[index] += 1
        setup = Setup(
            argv=tuple(sys.argv),
            seed=int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()),
            timeout_s=self.timeout_s,
            preparation=self._preparation,
        )
        path = [os.fspath(folder) for folder in sys.path]
        worker = Worker(setup, path=path, environment=self._environment)
        with self._lock:
            self._workers[index] = worker
            is_late = self._is_closed
        if is_late:
            worker.close()
        return worker


def _result(answer: bytes) -> object:
    try:
        result = unpack(answer)
    except Exception as error:
        raise _not_carried(error) from error
    if isinstance(result, Raised):
        raise CallRaised(result)
    return result


def _not_carried(error: Exception) -> CallRaised:
    """Return what is raised where arguments or a result cannot be pickled."""
    return CallRaised(Raised(kind=type(error).__name__, message=str(error), traceback=""))


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of this process without what torchrun tells a rank."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCH_VARIABLES and not name.startswith(_LAUNCH_PREFIX)
    }


def visible_devices(own: int, *, visible: str | None, count: int) -> str:
    """Return CUDA_VISIBLE_DEVICES of a worker: this rank's device first, then the others in their order.

    So "cuda" in a worker is the device that it is on this rank.

    Args:
        own: index of the rank's device among the visible ones.
        visible: the rank's CUDA_VISIBLE_DEVICES; None: not set.
        count: devices that the rank sees.
    """
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(count)]
    return ",".join([names[own], *names[:own], *names[own + 1 :]])
