"""Durable writes with fsync, and atomic replacement of files.

What is written goes through here, or into a hidden folder or file that is renamed when it is complete: a full
disk leaves nothing incomplete under a final name, and its error names the file.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from glm_rlhf.parallel.storage.model_folder import ModelFolderError

_BLOCK_BYTES = 16 * 2**20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of a file system that has no fsync for folders."""


@contextlib.contextmanager
def name_in_errors(path: str | Path) -> Iterator[None]:
    """Run a block that reads or writes `path`; an OSError without a file name gets this one.

    `write`, `fsync` and `pread` name no file when a disk is full or broken.

    Raises:
        OSError: the block's own, with `filename` and `strerror`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror is None:  # made from a text alone
            raise OSError(error.errno or errno.EIO, str(error), str(path)) from error
        if error.filename is None:
            error.filename = str(path)
        raise


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


def read_all(file: int, position: int, buffer: memoryview, *, path: Path, what: str) -> None:
    """Fill `buffer` from the open file of `path`.

    Raises:
        ModelFolderError: the file ends early while `what` was read.
        OSError: it cannot be read; the error names it.
    """
    done = 0
    while done < len(buffer):  # one call reads 2 GB at most
        try:  # rows of a few bytes are read so: a context manager would take as long as the call
            count = os.preadv(file, [buffer[done:]], position + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if count == 0:
            raise ModelFolderError(f"{path} was truncated while {what} was read")
        done += count


def sync(path: Path) -> None:
    """Fsync a file, or the entries of a folder.

    Raises:
        OSError: the disk did not take them; the error names `path`.
    """
    with name_in_errors(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_FSYNC:
                raise
        finally:
            os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Write and fsync a new file; its name is durable once its folder is synced.

    Raises:
        OSError: it exists, or cannot be written; the error names it. An incomplete file is removed.
    """
    with name_in_errors(path), path.open("xb", buffering=0) as file:
        try:
            write_all(file.fileno(), memoryview(content), 0)
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise


def replace_file(path: Path, content: bytes) -> None:
    """Replace the content of a file atomically: a reader, also after a kill, sees all old or all new.

    Raises:
        OSError: it cannot be written; the error names it, and the old content is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace the content of a file by UTF-8 text as `replace_file` does; a missing folder is created.

    Raises:
        OSError: it cannot be written; the error names it, and the old content is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(new: Path, target: Path) -> None:
    """Put a complete folder in the place of another one, or where none is.

    The two change names in one step where the system can do so (Linux, local file systems). Elsewhere the old
    one is renamed to `.<name>.replaced` first; after a kill between the two renames `recover_folder` gives it
    its name back. Either way no kill loses both.

    Raises:
        OSError: one of them cannot be renamed.
    """
    replaced = _replaced(target)
    remove(replaced)
    if not os.path.lexists(target):
        os.rename(new, target)
    elif _exchange(new, target):
        os.rename(new, replaced)
    else:
        os.rename(target, replaced)
        os.rename(new, target)
    sync(target.parent)
    remove(replaced)


def recover_folder(target: Path) -> None:
    """Give a folder its name back whose replacement was interrupted, and remove what one left over."""
    replaced = _replaced(target)
    if os.path.lexists(replaced) and not os.path.lexists(target):
        os.rename(replaced, target)
    remove(replaced)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two files or folders in one step; return whether the system can."""
    import ctypes  # not needed by the commands that only print

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # this file system cannot
        return False
    raise OSError(code, os.strerror(code), str(other))
