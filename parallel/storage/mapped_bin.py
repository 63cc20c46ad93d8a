"""The tensors of a `.bin` file, mapped by `torch.load` without running any code of it.

The file is opened with `weights_only=True`, which builds tensors and nothing else, over a mapping, so no
tensor is read before it is used.
"""

import pickle
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.safetensors_format import DTYPE_NAMES, FLOAT_DTYPES

_MAPPED_BYTES = 8 * 2**20
"""Pages that are read stay in memory while their mapping lives: it is renewed before more are read."""
_READS = threading.Lock()
"""One thread reads at a time, so that the pages of one tensor are in memory and not those of several."""


class BinFile:
    """A file of `torch.save(state_dict)`, and its mapping."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            ModelFolderError: the file is damaged, compressed, of torch's format of before 1.6, or holds
                something other than contiguous tensors under names.
        """
        self.path = path
        _check_archive(path)
        self._num_bytes = path.stat().st_size
        self._num_used = 0
        self._tensors = _map_tensors(path)

    def list_tensors(self) -> "dict[str, BinTensor]":
        """Return every tensor by name; none is read."""
        return {
            name: BinTensor(
                file=self,
                name=name,
                dtype=tensor.dtype if tensor.dtype in FLOAT_DTYPES.values() else None,
                dtype_name=DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
                shape=tuple(tensor.shape),
            )
            for name, tensor in self._tensors.items()
        }

    def read_into(self, name: str, dim: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill a tensor of the stored type with rows (dim 0) or columns (dim 1) of a tensor.

        Raises:
            ModelFolderError: the file has become shorter.
        """
        if self.path.stat().st_size < self._num_bytes:  # a page beyond the end would kill the process
            raise ModelFolderError(f"{self.path} was cut short while {name} was read")
        with _READS:
            num_bytes = out.nbytes if dim == 0 else self._tensors[name].nbytes
            if self._num_used and self._num_used + num_bytes > _MAPPED_BYTES:
                self._tensors, self._num_used = _map_tensors(self.path), 0
            self._num_used += num_bytes
            out.copy_(self._tensors[name].narrow(dim, start, stop - start))


@dataclass(frozen=True, slots=True, kw_only=True)
class BinTensor:
    """A tensor of a `.bin` file; read like one of a safetensors file."""

    file: BinFile
    """The file."""
    name: str
    """Its name in the file."""
    dtype: torch.dtype | None
    """Its type, `None` where it is none of the floating-point types of weights."""
    dtype_name: str
    """The type as the safetensors format calls it."""
    shape: tuple[int, ...]
    """Row-major dimensions."""

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path

    def read_into(self, dim: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill a tensor of the stored type with rows (dim 0) or columns (dim 1).

        Raises:
            ModelFolderError: the file has become shorter.
        """
        self.file.read_into(self.name, dim, start, stop, out)


def _check_archive(path: Path) -> None:
    """Refuse what is no archive, and compressed records, of which torch would map the compressed bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [r.filename for r in archive.infolist() if r.compress_type != zipfile.ZIP_STORED]
    except zipfile.BadZipFile:
        raise ModelFolderError(
            f"{path} is truncated or in torch's format of before 1.6; load it with torch and save it again"
        ) from None
    except Exception as error:  # damaged bytes end in errors of many types, below in torch of still more
        raise _damaged(path, error) from None
    if compressed:
        raise ModelFolderError(f"{path} is compressed ({compressed[0]}); save it again with torch.save")


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
    return {name: tensor.detach() for name, tensor in content.items()}


def _damaged(path: Path, error: Exception) -> ModelFolderError:
    first_line = next(iter(str(error).splitlines()), "")
    return ModelFolderError(f"{path} is damaged: {type(error).__name__} {first_line}")
