"""The positions of the tensors in a `torch.save` file, without executing any of its code.

Such a file is an uncompressed zip archive: a pickle that describes the tensors, and one record of bytes per
storage. torch opens the pickle with `weights_only=True`, which builds only tensors, over a mapping of the
file, so that no tensor is read. The positions of the storages in that mapping are their positions in the
file; they are checked against the archive's list of records.
"""

import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.safetensors_format import DTYPE_NAMES, HeaderEntry

_LOCAL_HEADER = struct.Struct("<26xHH")
"""A zip record's own header: the lengths of name and extra field, which the bytes follow."""


def read_pickled_header(path: Path) -> dict[str, HeaderEntry]:
    """Return every tensor of a file of `torch.save(state_dict)` by name; no tensor is read.

    Raises:
        ModelFolderError: the file is damaged, compressed, of torch's format of before 1.6, or holds something
            other than contiguous tensors under names.
    """
    records = _storage_records(path)
    tensors = _map_tensors(path)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    base = min(pointers, default=0) - min(records, default=0)
    entries = {}
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        begin = tensor.untyped_storage().data_ptr() - base if num_bytes else 0
        offset = tensor.storage_offset() * tensor.element_size()
        if num_bytes and (begin not in records or offset + num_bytes > records[begin]):
            raise ModelFolderError(f"{path} is damaged: the bytes of {name!r} are not where they should be")
        kind = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        entries[name] = HeaderEntry(kind, tuple(tensor.shape), begin + offset, num_bytes)
    return entries


def _storage_records(path: Path) -> dict[int, int]:
    """Length of every storage by its first byte in the file."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ModelFolderError(
                        f"{path} is compressed ({record.filename}); save it again with torch.save"
                    )
                if record.file_size and re.fullmatch(r"[^/]+/data/[^/]+", record.filename):
                    file.seek(record.header_offset)
                    lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                    records[file.tell() + sum(lengths)] = record.file_size
    except ModelFolderError:
        raise
    except zipfile.BadZipFile:
        raise ModelFolderError(
            f"{path} is truncated or in torch's format of before 1.6; load it with torch and save it again"
        ) from None
    except Exception as error:  # damaged bytes end in errors of many types, below in torch of still more
        raise _damaged(path, error) from None
    return records


def _map_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ModelFolderError(
            f"{path} holds something other than tensors, which is not loaded because it could run code; "
            "save the bare state_dict, best as safetensors"
        ) from None
    except Exception as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}; a state_dict is required")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ModelFolderError(
                f"{path} holds {type(tensor).__name__} under {name!r}; tensors are required"
            )
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise ModelFolderError(f"{path} holds {name!r} with gaps; save it again after .contiguous()")
    return content


def _damaged(path: Path, error: Exception) -> ModelFolderError:
    first_line = next(iter(str(error).splitlines()), "")
    return ModelFolderError(f"{path} is damaged: {type(error).__name__} {first_line}")
