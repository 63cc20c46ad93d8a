"""A function's result from a process of its own, with its own memory and environment."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any


def in_fresh_process(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Return `function(*arguments)`, run in a new interpreter with `environment` added to this one's.

    Args:
        function: of a module's top level; it, its arguments and its result are pickled.
        environment: read by libraries when they are imported, such as OMP_NUM_THREADS.

    Raises:
        RuntimeError: the function raised, or its process died; the message says which.
    """
    with _environment(environment or {}):
        return _result(multiprocessing.get_context("spawn"), function, arguments)


class PreparedProcesses:
    """Makes fresh processes that have some modules imported already, and so start at once."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Name what is imported once; each process is a copy of one that did nothing else."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)` from such a process; otherwise as `in_fresh_process`."""
        return _result(self._context, function, arguments)


def _result(context: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        is_done, result = receiver.recv()
    except EOFError:
        is_done, result = False, "its process ended without an answer"
    process.join()
    if not is_done:
        raise RuntimeError(f"{function.__name__}: {result}")
    return result


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:  # it is raised again on the other side
        sender.send((False, f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
