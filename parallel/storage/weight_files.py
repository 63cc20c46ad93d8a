"""The tensors of a Hugging Face folder, listed from headers and read slice by slice.

Slices of safetensors files are read straight into the tensors that will hold them. The library's `safe_open`
maps the file instead and leaves the copy to the caller: page faults make that slower (`convert_io_cpu`), the
mapped pages count twice, and a file that is cut short while it is read kills the process. Its own files and
ours are the same to both (`test_safetensors_format`).
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from glm_rlhf.parallel.storage.checkpoint_manifest import is_checkpoint
from glm_rlhf.parallel.storage.checkpoint_tensors import ShardedTensor, list_checkpoint
from glm_rlhf.parallel.storage.durable_io import read_all
from glm_rlhf.parallel.storage.mapped_bin import BinFile, BinTensor
from glm_rlhf.parallel.storage.model_folder import ModelFolderError, plain_file
from glm_rlhf.parallel.storage.safetensors_format import FLOAT_DTYPES, read_header
from glm_rlhf.parallel.storage.text_files import read_json

_FORMS = ("model.safetensors", "pytorch_model.bin")
"""Single-file names in order of preference, each of which may be split with an `.index.json`."""

_BLOCK_BYTES = 8 * 2**20
"""Rows that are cast at a time."""
_CASTS_COLUMNS = threading.Lock()
"""Columns are cast whole, and so by one thread at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file, not yet read."""

    path: Path
    """The file."""
    name: str
    """Name in the file."""
    dtype: torch.dtype | None
    """Type; `None` if it is not a floating-point type of weights."""
    dtype_name: str
    """The type as the file names it."""
    shape: tuple[int, ...]
    """Row-major dimensions."""
    offset: int
    """First byte in the file."""

    def read_into(self, dim: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill a contiguous tensor of the stored type with rows (dim 0) or columns (dim 1)."""
        row_bytes = prod(self.shape[1:]) * out.element_size()
        content = memoryview(out.flatten().view(torch.uint8).numpy())
        what = f"{self.path} was truncated while {self.name} was read"
        with self.path.open("rb", buffering=0) as file:
            if dim == 0:
                read_all(file.fileno(), self.offset + start * row_bytes, content, what=what)
                return
            _prefetch(file.fileno(), self.offset, self.shape[0] * row_bytes)
            width = (stop - start) * out.element_size()
            position = self.offset + start * out.element_size()
            for row in range(self.shape[0]):
                read_all(file.fileno(), position, content[row * width : (row + 1) * width], what=what)
                position += row_bytes


FileTensor = StoredTensor | BinTensor
"""A tensor in a file of a Hugging Face folder."""


def list_tensors(folder: Path) -> Mapping[str, FileTensor] | Mapping[str, ShardedTensor]:
    """Return every tensor of a folder by name, from headers alone.

    `model.safetensors` is preferred to `pytorch_model.bin`, each in one file or in the files of an index. For
    a training checkpoint, the tensors are those of its first model.

    Raises:
        ModelFolderError: there are no weights, a file is missing, damaged or unsafe, or the index and the
            files disagree.
    """
    if is_checkpoint(folder):
        return list_checkpoint(folder)
    for single in _FORMS:
        if os.path.lexists(folder / single):
            return _list_file(plain_file(folder, single))
        if os.path.lexists(folder / f"{single}.index.json"):
            return _list_indexed(folder, f"{single}.index.json")
    expected = ", ".join(f"{single} or {single}.index.json" for single in _FORMS)
    raise ModelFolderError(f"{folder} has no weights; {expected} is required")


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights, valid or not; a folder with only a tokenizer does not."""
    if is_checkpoint(folder):
        return True
    return any(os.path.lexists(folder / f"{single}{end}") for single in _FORMS for end in ("", ".index.json"))


def _list_indexed(folder: Path, index_name: str) -> dict[str, FileTensor]:
    index = plain_file(folder, index_name)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{index} has no weight_map; an object of tensor name to file is required")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ModelFolderError(f"{index}: the file of {name!r} is {file!r}; a file name is required")
    tensors: dict[str, FileTensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, stored in _list_file(plain_file(folder, file)).items():
            if weight_map.get(name) != file:
                listed = weight_map.get(name, "no file")
                raise ModelFolderError(
                    f"{folder / file} holds the tensor {name!r}, {index} gives {listed} for it"
                )
            tensors[name] = stored
    for name, file in weight_map.items():
        if name not in tensors:
            raise ModelFolderError(f"{index} gives {file} for the tensor {name!r}, which is not in it")
    return tensors


def _list_file(path: Path) -> Mapping[str, FileTensor]:
    if path.suffix == ".bin":
        return BinFile(path).list_tensors()
    if path.suffix != ".safetensors":
        raise ModelFolderError(f"{path} is neither a .safetensors nor a .bin file")
    return {
        name: StoredTensor(
            path=path,
            name=name,
            dtype=FLOAT_DTYPES.get(entry.dtype),
            dtype_name=entry.dtype,
            shape=entry.shape,
            offset=entry.offset,
        )
        for name, entry in read_header(path).items()
    }


def read_slice(
    stored: FileTensor | ShardedTensor, dim: int, start: int, stop: int, out: torch.Tensor
) -> None:
    """Fill `out` with rows (dim 0) or columns (dim 1) of a stored tensor, cast to its type.

    Several threads may call it.

    Args:
        stored: a tensor of one or two dimensions.
        dim: the dimension that is sliced.
        start: first index.
        stop: one past the last index.
        out: CPU tensor of the slice's shape; may be a view.

    Raises:
        ModelFolderError: the file has become shorter since its header was read, or a value does not fit the
            type.
    """
    if out.dtype == stored.dtype and out.is_contiguous():
        stored.read_into(dim, start, stop, out)
    elif dim == 0:
        assert stored.dtype is not None, "weights are floating-point numbers"
        step = max(1, _BLOCK_BYTES // (prod(stored.shape[1:]) * stored.dtype.itemsize))
        for row in range(start, stop, step):
            block = out[row - start : row - start + step]
            _read_and_cast(stored, 0, row, row + len(block), block)
    else:
        with _CASTS_COLUMNS:
            _read_and_cast(stored, 1, start, stop, out)


def _read_and_cast(
    stored: FileTensor | ShardedTensor, dim: int, start: int, stop: int, out: torch.Tensor
) -> None:
    piece = torch.empty(out.shape, dtype=stored.dtype)
    stored.read_into(dim, start, stop, piece)
    copy_checked(out, piece, stored.name)


def copy_checked(out: torch.Tensor, values: torch.Tensor, name: str) -> None:
    """Copy `values` to `out`, cast; a finite value must not become infinite.

    Raises:
        ValueError: a value is beyond the range of `out.dtype`.
    """
    values = values.detach()
    out.copy_(values)
    limit = torch.finfo(out.dtype).max
    if limit >= torch.finfo(values.dtype).max or not values.numel():
        return
    smallest, largest = (bound.item() for bound in values.aminmax())
    if not -limit <= smallest <= largest <= limit:  # NaN fails it too: look at every value
        num_lost = int(torch.isfinite(values).sum()) - int(torch.isfinite(out).sum())
        if num_lost:
            raise ValueError(
                f"{num_lost} values of {name} do not fit {out.dtype}; choose bfloat16 or float32 instead"
            )


def _prefetch(file: int, position: int, num_bytes: int) -> None:
    """Request the whole tensor at once: otherwise strided reads wait for the disk at every row."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, position, num_bytes, os.POSIX_FADV_WILLNEED)
