"""Durable writes with fsync, and atomic replacement of files."""

import os
from collections.abc import Callable
from pathlib import Path

from glm_rlhf.parallel.storage.model_folder import ModelFolderError

_BLOCK_BYTES = 16 * 2**20


def write_all(
    file: int, content: memoryview, position: int, *, on_block: Callable[[memoryview], object] | None = None
) -> None:
    """Write all of `content` to an open file, block by block; `on_block` is called before each block."""
    for start in range(0, len(content), _BLOCK_BYTES):
        block = content[start : start + _BLOCK_BYTES]
        if on_block is not None:
            on_block(block)
        done = 0
        while done < len(block):  # one call may write only a part
            done += os.pwrite(file, block[done:], position + start + done)


def read_all(file: int, position: int, buffer: memoryview, *, what: str) -> None:
    """Fill `buffer` from an open file.

    Raises:
        ModelFolderError: with the message `what`, if the file ends early.
    """
    done = 0
    while done < len(buffer):  # one call reads 2 GB at most
        count = os.preadv(file, [buffer[done:]], position + done)
        if count == 0:
            raise ModelFolderError(what)
        done += count


def sync(path: Path) -> None:
    """Fsync a file, or the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Write and fsync a new file; its name is durable once its folder is synced."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Replace the content of a file atomically: a reader, also after a kill, sees all old or all new."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync(path.parent)
