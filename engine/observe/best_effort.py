"""Output that a run can do without: a failed write is logged, and the run continues."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.storage.durable_io import name_in_errors, write_all

_MOST_WAITING_BYTES = 2**24


@contextlib.contextmanager
def without_failing(path: str | Path) -> Iterator[None]:
    """Run a block that writes `path`; its OSError is logged and ends the block alone."""
    try:
        with name_in_errors(path):
            yield
    except OSError as error:
        log(f"{error.filename}: {error.strerror}; it was not written, the run continues without it")


class GrowingFile:
    """Owns a file to which text is appended while a run lasts, such as its metrics.

    A write that fails, because the disk is full, leaves the file at the end of the last complete text. The
    first failure is logged; what could not be written waits in memory (16 MiB at most), and is written with
    the next text that can be.
    """

    def __init__(self, path: Path, *, is_new: bool = True) -> None:
        """Open the file; a new one replaces what is there, else text is appended.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._file = path.open("wb" if is_new else "ab", buffering=0)
        self._waiting = b""
        self._is_failing = self._has_ended = False

    def append(self, text: str) -> None:
        """Append text."""
        if self._has_ended:
            return
        self._waiting += text.encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            with name_in_errors(self.path):
                write_all(self._file.fileno(), memoryview(self._waiting), end)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            self._has_ended = len(self._waiting) > _MOST_WAITING_BYTES
            if not self._is_failing or self._has_ended:
                plan = "it ends here" if self._has_ended else "what is missing waits for room"
                log(f"{self.path}: {error.strerror}; {plan}, the run continues")
            self._is_failing = True
            return
        self._waiting = b""
        if self._is_failing:
            log(f"{self.path} can be written again, and is complete")
        self._is_failing = False

    def close(self) -> None:
        """Try once more to write what waits, and close the file; what is lost is logged."""
        if self._waiting:
            self.append("")
            if self._waiting:
                log(f"{self.path} lacks its last {len(self._waiting.splitlines())} lines")
        with contextlib.suppress(OSError):
            self._file.close()
