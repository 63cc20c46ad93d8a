"""One worker process as its parent sees it: started, asked, and ended."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache

from glm_rlhf.engine.workers.messages import Inbox, Setup, pack

_CODE = (
    "import json, sys; descriptor, parent, path = sys.argv[2:]; sys.path[:] = json.loads(path); "
    "from glm_rlhf.engine.workers.child import main; main(int(descriptor), int(parent))"
)
_POLL_S = 0.5
_LEAVE_S = 2.0
_GRACE_S = 1.0  # in which a call that is past its time writes its stacks
_START_S = 120.0  # of an interpreter on a busy machine


class WorkerDied(Exception):
    """A worker process that ended before it answered; the text says how."""


class WorkerTimeout(Exception):
    """A worker process that did not answer in time, and was ended."""


class Worker:
    """Owns one process and the connection to it."""

    def __init__(self, setup: Setup, *, path: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process; `ask(None)` waits until it has started and is prepared.

        Args:
            setup: its first message.
            path: its `sys.path`.
            environment: its environment variables.

        Raises:
            Exception: the setup cannot be pickled, or no process can be started.
        """
        content = pack(setup)
        self._setup = setup
        self._connection, other = socket.socketpair()
        self._inbox = Inbox(self._connection)
        self.is_ready = self._is_busy = False
        with other:
            try:
                self._process = _spawn(other, path, environment)
            except BaseException:
                self._connection.close()
                raise
        self._has_started = False
        with contextlib.suppress(OSError):  # one that has ended at once: the first answer says so
            self._connection.settimeout(setup.timeout_s)
            self._connection.sendall(content)

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def ask(self, content: bytes | None) -> bytes:
        """Return the answer to a message, still packed; with None, the answer of the preparation.

        Args:
            content: of `pack`.

        Raises:
            WorkerTimeout: no answer in the setup's timeout; the process has been ended.
            WorkerDied: the process ended by itself.
        """
        self._is_busy = True
        try:
            if content is not None:
                self._connection.settimeout(self._setup.timeout_s + _GRACE_S)
                self._connection.sendall(content)
            if not self._has_started:
                self._receive(_START_S)
                self._has_started = True
            return self._receive(self._setup.timeout_s + _GRACE_S)
        except TimeoutError:
            self._kill()
            raise WorkerTimeout from None
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LEAVE_S)  # its connection is closed before its exit code is known
            ending = _ending(self._process.poll())
            self._kill()
            raise WorkerDied(ending) from None
        except BaseException:  # an interrupt: what it would answer later belongs to no call
            self._kill()
            raise
        finally:
            self._is_busy = False

    def close(self) -> None:
        """Let the process end by itself where it is idle; end it where it is in a call, or does not."""
        is_busy = self._is_busy
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if not is_busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LEAVE_S)
        self._kill_group()
        if not is_busy:  # else the thread in the call closes it: the number of a closed one is used again
            self._connection.close()

    def _kill(self) -> None:
        self._kill_group()
        self._connection.close()

    def _kill_group(self) -> None:
        """End the process, with those that it started in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_S)

    def _receive(self, left_s: float) -> bytes:
        """Return the next message; notices the end of the process also where another one holds its socket.

        Time in which this process was stopped does not count: the worker may have been too.
        """
        is_last = False
        while True:
            start = time.monotonic()
            self._connection.settimeout(min(max(left_s, 0.001), _POLL_S))
            try:
                return self._inbox.receive()
            except TimeoutError:
                left_s -= min(time.monotonic() - start, 2 * _POLL_S)
                if is_last:
                    raise EOFError from None
                is_last = not self.is_alive
                if not is_last and left_s <= 0:
                    raise


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _spawn(
    connection: socket.socket, path: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen:
    descriptor = connection.fileno()
    arguments = ["glm-rlhf worker", str(descriptor), str(os.getpid()), json.dumps(list(path))]
    line = [sys.executable, "-c", _CODE, *arguments]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, pass_fds=(descriptor,), env=dict(environment), process_group=0
        )

    return _spawner(os.getpid()).run(start)


class _Spawner:
    """Owns the thread that starts processes.

    The kernel ends a worker with the *thread* that started it, so that thread has to last. It blocks the
    signals that a worker is kept from, which a worker inherits until it has handlers.
    """

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, name="worker spawner", daemon=True).start()

    def run(self, start: Callable[[], subprocess.Popen]) -> subprocess.Popen:
        """Return what `start` returns on that thread."""
        future: Future = Future()
        self._waiting.put((start, future))
        return future.result()

    def _work(self) -> None:
        from glm_rlhf.engine.workers.child import SIGNALS

        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        while True:
            start, future = self._waiting.get()
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)


@cache
def _spawner(_pid: int) -> _Spawner:
    """Return the one of this process; a forked process has its own."""
    return _Spawner()
