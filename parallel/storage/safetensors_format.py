"""The header of a safetensors file, which gives the position of each tensor.

Headers are checked to the byte before any tensor is read: a file is accepted only if its tensors fill it
without gaps, overlaps or trailing bytes. Source: the format's description in the safetensors repository.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.text_files import parse_json_object

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_MAX_DIMS = 8
"""Most dimensions of a tensor: a weight has two."""

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that a weight may have."""

STORED_DTYPES = FLOAT_DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that tensors of a checkpoint may have: counters, masks and generator states are not floats."""

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
"""The same, from torch's type to the format's name."""

_ELEMENT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_ELEMENT_BYTES |= {"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
_ELEMENT_BYTES |= {"U64": 8, "I64": 8, "F64": 8, "C64": 8}


def check_float(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` after checking that weights can be stored in it.

    Raises:
        ValueError: they cannot.
    """
    if dtype not in FLOAT_DTYPES.values():
        known = ", ".join(str(known) for known in FLOAT_DTYPES.values())
        raise ValueError(f"weights cannot be stored as {dtype}; it must be one of {known}")
    return dtype


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """Position of one tensor in its file."""

    dtype: str
    """The format's name of the type, such as `BF16`."""
    shape: tuple[int, ...]
    """Row-major dimensions."""
    offset: int
    """First byte, from the start of the file."""
    num_bytes: int
    """Length."""


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Return every tensor of a safetensors file by name; no tensor is read.

    Raises:
        ModelFolderError: the file is truncated, its header is too large or not JSON, or tensors overlap,
            leave a hole, have the wrong length for their shape, or do not fill the file.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ModelFolderError(f"{path} has {file_bytes} bytes; a safetensors file has at least 8")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise ModelFolderError(
                f"{path} says that its header has {header_bytes} bytes; at most {MAX_HEADER_BYTES} are "
                "allowed"
            )
        if header_bytes > file_bytes - 8:
            raise ModelFolderError(
                f"{path} is truncated: {file_bytes} bytes, and its header alone needs {8 + header_bytes}"
            )
        raw = file.read(header_bytes)
    try:
        header = parse_json_object(raw.decode("utf-8"), what=f"the header of {path}")
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"the header of {path} is not UTF-8 text (byte {error.start})") from None
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    _check_filled(path, entries, data_start, file_bytes)
    return entries


def _entry(path: Path, name: str, value: object, data_start: int) -> HeaderEntry:
    where = f"the header of {path}, tensor {name!r:.200}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ModelFolderError(f"{where}: exactly dtype, shape and data_offsets are required")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
        raise ModelFolderError(
            f"{where}: dtype {dtype!r:.40} is unknown; known are {', '.join(_ELEMENT_BYTES)}"
        )
    if not _is_list_of_counts(shape, _MAX_DIMS):
        raise ModelFolderError(
            f"{where}: shape {shape!r:.80} is not a list of counts, {_MAX_DIMS} dimensions at most"
        )
    if not _is_list_of_counts(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFolderError(f"{where}: data_offsets {offsets!r:.80} are not [begin, end]")
    begin, end = offsets
    required = prod(shape) * _ELEMENT_BYTES[dtype]
    if end - begin != required:
        raise ModelFolderError(
            f"{where}: {end - begin} bytes stand there, {dtype} {list(shape)} needs {required}"
        )
    return HeaderEntry(dtype, tuple(shape), data_start + begin, required)


def _is_list_of_counts(value: object, longest: int) -> bool:
    if not isinstance(value, list) or len(value) > longest:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_filled(path: Path, entries: dict[str, HeaderEntry], data_start: int, file_bytes: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != position:
            fault = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise ModelFolderError(
                f"the header of {path}, tensor {name!r}: begins at byte {entry.offset} and {fault}, "
                f"{position} is required"
            )
        position += entry.num_bytes
    if position != file_bytes:
        fault = "is truncated" if position > file_bytes else "has bytes left over"
        raise ModelFolderError(f"{path} {fault}: {file_bytes} bytes, its tensors need {position}")


def plan_file(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, HeaderEntry]]:
    """Return the first bytes of a safetensors file for `tensors`, and the position of each tensor.

    Wider types come first, so that every tensor is aligned to its own type, as readers expect.

    Args:
        tensors: dtype and shape by name; types of `STORED_DTYPES`.

    Returns:
        (length prefix and header, entries by name in the file's order)
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, spans = 0, {}
    for name, (dtype, shape) in ordered:
        num_bytes = prod(shape) * dtype.itemsize
        offsets = [position, position + num_bytes]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        spans[name] = (DTYPE_NAMES[dtype], tuple(shape), position, num_bytes)
        position += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    entries = {
        name: HeaderEntry(dtype, shape, data_start + begin, num_bytes)
        for name, (dtype, shape, begin, num_bytes) in spans.items()
    }
    return struct.pack("<Q", len(text)) + text, entries
