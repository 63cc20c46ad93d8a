"""Writes JSON-lines files that get their name only when they are complete."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from glm_rlhf.parallel.storage.durable_io import name_in_errors

WriteLine = Callable[[dict], None]


@contextlib.contextmanager
def json_lines(path: str | Path) -> Iterator[WriteLine]:
    """Return, as a context manager, a function that writes one record per line.

    Lines go to `<path>.partial`, which is renamed to `path` at the end of the block. After an exception an
    earlier file at `path` is unchanged, and the partial file is kept for inspection.

    Raises:
        OSError: the folder cannot be created or written, or `path` is a folder; the error names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, lines need a file", str(path))
    partial = path.with_name(f"{path.name}.partial")
    file = partial.open("w", encoding="utf-8")
    try:
        yield lambda record: _write(file, partial, record)
        with name_in_errors(partial):
            file.flush()
            os.fsync(file.fileno())
            file.close()
    except BaseException:
        with contextlib.suppress(OSError):  # what is buffered does not fit either
            file.close()
        raise
    partial.replace(path)


def _write(file: TextIO, path: Path, record: dict) -> None:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    with name_in_errors(path):
        file.write(line)
