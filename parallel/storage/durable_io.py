"""Bytes that are surely on the disk, and files that change from old to new in one step."""

import os
from collections.abc import Callable
from pathlib import Path

from glm_rlhf.parallel.storage.model_folder import ModelFolderError

_BLOCK_BYTES = 16 * 2**20


def write_all(
    file: int, content: memoryview, position: int, *, on_block: Callable[[memoryview], object] | None = None
) -> None:
    """Write all of `content` into an open file, block by block; `on_block` sees each block before it goes."""
    for start in range(0, len(content), _BLOCK_BYTES):
        block = content[start : start + _BLOCK_BYTES]
        if on_block is not None:
            on_block(block)
        done = 0
        while done < len(block):  # one call may write less than it is given
            done += os.pwrite(file, block[done:], position + start + done)


def read_all(file: int, position: int, buffer: memoryview, *, what: str) -> None:
    """Fill `buffer` from an open file.

    Raises:
        ModelFolderError: `what`, when the file ends before.
    """
    done = 0
    while done < len(buffer):  # one call reads 2 GB at most
        count = os.preadv(file, [buffer[done:]], position + done)
        if count == 0:
            raise ModelFolderError(what)
        done += count


def sync(path: Path) -> None:
    """Return when a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file; it is on the disk when this returns, its name when its folder is synced."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content: whoever reads it, also after a kill, finds all old or all new."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    write_synced(beside, content)
    os.replace(beside, path)
    sync(path.parent)
