"""A folder of safetensors files that appears atomically when it is complete.

The files are planned from names, shapes and types, so that headers are written first and tensors in any
order. Until the end everything is in a hidden folder next to the target.

Several processes can write at once: each file has one writer, because two clients of a network file system
must not write to one file, and barriers separate the stages.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from glm_rlhf.parallel.storage.durable_io import name_in_errors, remove, sync, write_all, write_synced
from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.safetensors_format import HeaderEntry, plan_file
from glm_rlhf.parallel.storage.writer_lock import one_writer


def _no_barrier() -> None:
    """Do nothing: a single writer does not wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """The assignment of layers to processes that write to one file system."""

    rank: int = 0
    """This process among the writers."""
    count: int = 1
    """Number of writers."""
    barrier: Callable[[], None] = _no_barrier
    """Returns when all writers have called it."""
    writer_of_layer: Sequence[int] | None = None
    """Writer of each layer of the model, such as its pipeline stage; `None` splits the layers evenly."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ValueError(
                f"rank is {self.rank}; with {self.count} writers it must be 0 to {self.count - 1}"
            )
        if self.count > 1 and self.barrier is _no_barrier:
            raise ValueError(f"{self.count} writers need a barrier, such as torch.distributed.barrier")

    def of_layer(self, layer: int, num_layers: int) -> int:
        """Return the writer of a layer; the first layer's writes the embedding, the last's norm and head."""
        if self.writer_of_layer is not None:
            return self.writer_of_layer[layer]
        return layer * self.count // num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the folder."""

    name: str
    """Name in the file."""
    dtype: torch.dtype
    """Type in the file."""
    shape: tuple[int, ...]
    """Whole shape."""
    writer: int
    """Process that writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file of the folder."""

    name: str
    """File name."""
    writer: int
    """Process that writes it."""
    prefix: bytes
    """Length prefix and header."""
    entries: Mapping[str, HeaderEntry]
    """Position of each tensor."""

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.prefix) + self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        """Size of the tensors alone."""
        return sum(entry.num_bytes for entry in self.entries.values())


def plan_files(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> list[PlannedFile]:
    """Return the files that hold `tensors` in order.

    A new file begins when the writer changes or `max_shard_bytes` would be exceeded; a larger tensor gets its
    own file. A single file is named `model.safetensors`, several are numbered as in transformers.

    Args:
        tensors: all tensors of the folder, the same list on every writer.
        max_shard_bytes: largest sum of tensor bytes in a file.

    Raises:
        ValueError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    groups: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        num_bytes = prod(tensor.shape) * tensor.dtype.itemsize
        if not groups or groups[-1][0].writer != tensor.writer or num_bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= num_bytes
    files = []
    for index, group in enumerate(groups, start=1):
        prefix, entries = plan_file({tensor.name: (tensor.dtype, tensor.shape) for tensor in group})
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        files.append(PlannedFile(name=name, writer=group[0].writer, prefix=prefix, entries=entries))
    return files


class TensorFiles:
    """The planned files of one writer in a folder."""

    def __init__(self, folder: Path, files: Sequence[PlannedFile]) -> None:
        """Create the files with their headers and their full length."""
        self.folder = folder
        self.files = files
        self.entries = {name: entry for file in files for name, entry in file.entries.items()}
        self._path_of = {name: folder / file.name for file in files for name in file.entries}
        for file in files:
            path = folder / file.name
            with name_in_errors(path), path.open("xb") as output:
                output.write(file.prefix)
                output.truncate(file.num_bytes)

    def write(self, name: str, rows: torch.Tensor, start: int = 0) -> None:
        """Write rows of a tensor to their place.

        Args:
            name: of the tensor.
            rows: contiguous CPU tensor of the planned type; the whole tensor, or consecutive rows of it.
            start: index of the first of them.
        """
        entry, path = self.entries[name], self._path_of[name]
        content = memoryview(rows.detach().flatten().view(torch.uint8).numpy())
        offset = start * prod(entry.shape[1:]) * rows.element_size()
        assert offset + len(content) <= entry.num_bytes, (name, offset, len(content), entry)
        with name_in_errors(path), path.open("r+b", buffering=0) as output:
            write_all(output.fileno(), content, entry.offset + offset)
            _start_writeback(output.fileno(), entry.offset + offset, len(content))

    def sync(self) -> None:
        """Return when the files are on the disk."""
        for file in self.files:
            sync(self.folder / file.name)


def _start_writeback(file: int, position: int, num_bytes: int) -> None:
    """Let the disk begin with what was just written, so that it works from the start and not at fsync alone.

    Linux writes dirty pages back, without being waited for, when they are said not to be needed any more.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, position, num_bytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def new_folder(target: Path, files: Sequence[PlannedFile], writers: Writers) -> Iterator[Path]:
    """Yield a hidden folder to write into; it becomes `target` when the block ends without an error.

    All writers enter and exit together: each calls `writers.barrier` three times. The first one holds the
    target's lock. After a failure a single writer removes the hidden folder; with several writers the next
    attempt does.

    Args:
        target: must not exist, or be an empty folder.
        files: the whole plan, the same on every writer.
        writers: the processes that write.

    Raises:
        ModelFolderError: the target exists, its parent does not, the disk has too little space, or a file
            does not have its planned size at the end.
        WriterError: another process writes to the target.
    """
    num_bytes = sum(file.num_bytes for file in files)
    _check_target(target, num_bytes)
    folder = target.parent / f".{target.name}.partial"
    with ExitStack() as stack:
        if writers.rank == 0:
            is_locked = stack.enter_context(one_writer(target))
            _check_target(target, num_bytes)  # the holder before may have just finished it
            _make_hidden(folder, target, is_locked=is_locked)
        writers.barrier()
        try:
            yield folder
            writers.barrier()
            if writers.rank == 0:
                _finish(folder, target, files)
            writers.barrier()
        except BaseException:
            if writers.count == 1:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _make_hidden(folder: Path, target: Path, *, is_locked: bool) -> None:
    if is_locked:  # no other process writes there, so that what is left over is of one that was killed
        remove(folder)
    elif os.path.lexists(folder):
        raise ModelFolderError(
            f"{folder} exists, and this file system has no locks: another process may be writing {target}; "
            "remove it if none is"
        )
    folder.mkdir()


def _check_target(target: Path, num_bytes: int) -> None:
    if not target.parent.is_dir():
        raise ModelFolderError(
            f"{target.parent} does not exist; create the folder that is to hold {target.name}"
        )
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ModelFolderError(f"{target} exists already; remove it or give another name")
    # What an attempt that failed has left is removed before this one writes.
    reclaimed = _bytes_on_disk(target.parent / f".{target.name}.partial")
    free = shutil.disk_usage(target.parent).free + reclaimed
    if free < num_bytes:
        raise ModelFolderError(
            f"{target} needs {num_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left; make room"
        )


def _bytes_on_disk(folder: Path) -> int:
    """Return the size of a folder's files; 0 where there is none, also if another writer just removes it."""
    try:
        return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    except OSError:
        return 0


def _finish(folder: Path, target: Path, files: Sequence[PlannedFile]) -> None:
    for file in files:
        path = folder / file.name
        num_bytes = path.stat().st_size if path.exists() else 0
        if num_bytes != file.num_bytes:
            raise ModelFolderError(
                f"{path} has {num_bytes} bytes of {file.num_bytes}; writer {file.writer} failed"
            )
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.entries}
        index = {
            "metadata": {"total_size": sum(file.tensor_bytes for file in files)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        write_synced(folder / "model.safetensors.index.json", text.encode())
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    os.rename(folder, target)
    sync(target.parent)
