"""Writes JSON-lines files that get their name only when they are complete."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

WriteLine = Callable[[dict], None]


@contextlib.contextmanager
def json_lines(path: str | Path) -> Iterator[WriteLine]:
    """Return, as a context manager, a function that writes one record per line.

    Lines go to `<path>.partial`, which is renamed to `path` at the end of the block. After an exception an
    earlier file at `path` is unchanged, and the partial file is kept for inspection.

    Raises:
        OSError: the folder cannot be created or written, or `path` is a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, lines need a file", str(path))
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield lambda record: _write(file, record)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:  # the error of a full disk names no file
            error.filename = str(partial)
        raise
    partial.replace(path)


def _write(file: TextIO, record: dict) -> None:
    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
