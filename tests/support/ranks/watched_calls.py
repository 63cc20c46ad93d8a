"""Functions that record their calls in a file, and kill the process before or after one of them."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CallLog:
    """Counts the calls of all functions that it watches, from all threads together."""

    def __init__(self, path: Path, kill_at: int | None) -> None:
        """Take the file of the record, and 2 n to die before the n-th call, 2 n + 1 to die after it."""
        self._file, self._kill_at = path.open("w", buffering=1), kill_at
        self._num_calls, self._lock = 0, threading.Lock()

    def watch(self, function: Callable, line_of: Callable[..., str]) -> Callable:
        """Return the function, recording first the line that `line_of` makes of a call's arguments."""

        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                number = 2 * self._num_calls
                self._num_calls += 1
                self._file.write(f"{line_of(*args)}\n")
            self._die_at(number)
            result = function(*args, **options)
            self._die_at(number + 1)
            return result

        return call

    def _die_at(self, moment: int) -> None:
        if moment == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
