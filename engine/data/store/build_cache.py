"""A cached folder of computed files, which is either complete or rebuilt."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from glm_rlhf.parallel.storage.durable_io import remove, write_synced

_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 2**24

_log = logging.getLogger(__name__)


class DamagedFolder(ValueError):
    """A cached folder that is missing, incomplete, altered, or of another identity."""


def ensure_folder(path: Path, identity: dict, fill: Callable[[Path], dict]) -> dict:
    """Return the facts of a cached folder, and build it first unless it is complete.

    Files are written to a `.partial` folder next to it, which is renamed when complete: a kill at any time
    leaves at most a `.partial` folder, which the next build on that host removes. An existing folder is
    accepted only if its identity is equal and all files have the size and checksum in its manifest.
    Concurrent processes wait for each other by a `.lock` file, which is kept; the later ones find the folder
    complete.

    Args:
        path: the folder; its parents are created.
        identity: all inputs that determine the content, as JSON values.
        fill: writes the files into the given empty folder and returns facts about them (JSON values).

    Raises:
        OSError: the folder cannot be written. Also what `fill` raises; the partial folder is then removed.
    """
    with contextlib.suppress(DamagedFolder):
        return read_folder(path, identity, checks_content=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path) as is_locked:
        try:
            return read_folder(path, identity, checks_content=True)
        except DamagedFolder as damage:
            if path.exists():
                _log.warning("%s; it is rebuilt", damage)
                _remove(path)
        if is_locked:
            # No other process of this host builds here, so its partial folders were left by a kill. Those of
            # other hosts are kept: some shared file systems grant the same lock to every host.
            for leftover in path.parent.glob(_partial_name(path, "*")):
                remove(leftover)
        return _build(path, identity, fill)


def read_folder(path: Path, identity: dict, *, checks_content: bool) -> dict:
    """Return the facts of an existing cached folder.

    Args:
        path: the folder.
        identity: the inputs that must have determined its content.
        checks_content: read all files and compare checksums; otherwise only compare sizes, which is enough
            right after another process has checked.

    Raises:
        DamagedFolder: it is missing, incomplete, altered, or of another identity.
    """
    try:
        manifest = _read_manifest(path)
        if manifest["identity"] != identity:
            raise DamagedFolder(f"{path} was built from other inputs")
        for name, (num_bytes, digest) in manifest["files"].items():
            found = (path / name).stat()
            if not stat.S_ISREG(found.st_mode):
                raise DamagedFolder(f"{path / name} is not a regular file")
            if found.st_size != num_bytes:
                raise DamagedFolder(f"{path / name} is damaged: it must have {num_bytes} bytes")
            if checks_content and file_digest(path / name) != digest:
                raise DamagedFolder(f"{path / name} is damaged: its checksum differs")
        return manifest["facts"]
    except FileNotFoundError as error:
        raise DamagedFolder(f"{error.filename} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedFolder):
            raise
        raise DamagedFolder(f"{path} cannot be read: {error!r}") from error


def stored_digests(path: Path, names: Iterable[str]) -> list[str]:
    """Return the checksums of files of a cached folder, as its manifest has them.

    Raises:
        DamagedFolder, OSError: the folder changed since `read_folder` accepted it.
    """
    files = _read_manifest(path)["files"]
    return [files[name][1] for name in names]


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return a folder's manifest after checking its own checksum."""
    file = path / _MANIFEST
    found = file.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_MANIFEST_BYTES:
        raise DamagedFolder(f"{file} is not a regular file of at most {_MAX_MANIFEST_BYTES} bytes")
    manifest = json.loads(file.read_bytes())
    if manifest.pop("checksum") != _digest_of_json(manifest):
        raise DamagedFolder(f"{file} is damaged: its checksum differs")
    return manifest


def file_digest(path: Path) -> str:
    """Return a checksum of a file's bytes, 128 bits of blake2b in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _build(path: Path, identity: dict, fill: Callable[[Path], dict]) -> dict:
    partial = path.with_name(_partial_name(path, uuid.uuid4().hex))
    partial.mkdir()
    try:
        facts = fill(partial)
        files = {file.name: [file.stat().st_size, file_digest(file)] for file in sorted(partial.iterdir())}
        manifest = {"identity": identity, "facts": facts, "files": files}
        manifest["checksum"] = _digest_of_json(manifest)
        write_synced(partial / _MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        try:
            # The data are not synced: the checksum detects what a power failure loses.
            partial.rename(path)
        except OSError:
            if not path.exists():
                raise
            # Without working locks another process may have been first; its files are the same.
            facts = read_folder(path, identity, checks_content=True)
            shutil.rmtree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return facts


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock of `path` and yield true, or yield false where the file system has no locks."""
    name = path.with_name(f"{path.name}.lock")
    # Not blocking: whoever opens a FIFO to write waits for its reader.
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
    with os.fdopen(descriptor, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that builds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s: no file locks here (%s); several runs may build it at once", path.parent, error)
            yield False
            return
        yield True  # closing the file releases the lock, and so does any end of the process


def _remove(path: Path) -> None:
    removed = path.with_name(_partial_name(path, uuid.uuid4().hex))
    with contextlib.suppress(FileNotFoundError):  # another host was faster
        path.rename(removed)
        remove(removed)


def _partial_name(path: Path, mark: str) -> str:
    return f"{path.name}.{socket.gethostname()}.{mark}.partial"


def _digest_of_json(value: dict) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
