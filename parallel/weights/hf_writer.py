"""Export of tensor-parallel shards to a Hugging Face folder, tensor by tensor.

The folder contains:
  - weights under the family's names, the value head in float32; a tied head is stored once;
  - `config.json`, and from a source folder the tokenizer, generation settings and licence, and from the same
    family the remote code;
  - ChatGLM's `inv_freq` if a source of the same family has it: it is no weight, but the remote code registers
    it.
"""

import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.sharding import HfSlice, ParamShard, place_shard, shards_of
from glm_rlhf.parallel.spec.weight_map import (
    NOT_WEIGHTS,
    SCALAR_ROLES,
    Role,
    Weight,
    names_within,
    weights_of,
)
from glm_rlhf.parallel.storage.durable_io import name_in_errors, write_synced
from glm_rlhf.parallel.storage.folder_writer import (
    PlannedTensor,
    TensorFiles,
    Writers,
    new_folder,
    plan_files,
)
from glm_rlhf.parallel.storage.hf_config import read_config, write_config
from glm_rlhf.parallel.storage.model_folder import open_folder, plain_file
from glm_rlhf.parallel.storage.safetensors_format import FLOAT_DTYPES, check_float
from glm_rlhf.parallel.storage.weight_files import (
    FileTensor,
    copy_checked,
    has_weights,
    list_tensors,
    read_slice,
)

_EXTRA_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "tokenization_*.py",
    "generation_config.json",
    "LICENSE*",
    "MODEL_LICENSE*",
)
_EXTRA_FILES_WITHIN_FAMILY = ("configuration_*.py", "modeling_*.py", "quantization.py")

_BLOCK_BYTES = 16 * 2**20
"""Rows that are cast, joined or fetched from a device at a time."""


def export_tensors(
    target: str | Path,
    config: GLMConfig,
    tensors: Iterable[tuple[str, Sequence[torch.Tensor]]],
    *,
    tp_size: int,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    role: Role = "policy",
    without: Collection[str] = (),
    max_shard_bytes: int = 5_000_000_000,
    source: str | Path | None = None,
    writers: Writers | None = None,
) -> None:
    """Write a Hugging Face folder of the config's family; it appears atomically when it is complete.

    Every writer calls it, with the tensors of its own layers; nothing else may call. Memory holds the tensors
    at hand and a block of rows put together from them. The barrier of `writers` is passed three times.

    Args:
        target: the new folder; it must not exist, or be empty.
        config: the model.
        tensors: (name, one tensor per tensor-parallel rank, in order), each parameter once, in any order, on
            any device. Of replicated parameters the first rank's copy is written; a warning names those that
            differ. A tied head's copy on the last pipeline stage is skipped.
        tp_size: number of tensors per parameter.
        dtype: of the files; a mapping gives it per Hugging Face name. The value head is float32.
        role: determines the head.
        without: names that are neither passed nor written: the bias of a value head without one.
        max_shard_bytes: largest file, except for single larger tensors.
        source: folder whose tokenizer, settings and other config keys are copied.
        writers: the processes that write; `None` for this one alone.

    Raises:
        ModelFolderError: the target exists, the source is unusable, or the disk has too little space.
        ValueError: a parameter is missing, unknown, passed twice, of a wrong shape, or does not fit the type.
    """
    writers = writers or Writers()
    weights = weights_of(config, layers=range(config.num_layers), role=role)
    weights = [weight for weight in weights if weight.name not in without]
    plan = _plan(weights, config, dtype, writers)
    extras = _non_weight_tensors(source, config)
    last_writer = writers.of_layer(config.num_layers - 1, config.num_layers)
    for stored in extras:
        plan.append(
            PlannedTensor(name=stored.name, dtype=stored.dtype, shape=stored.shape, writer=last_writer)
        )
    files = plan_files(plan, max_shard_bytes)
    own = [weight for weight in weights if writer_of(weight.name, config, writers) == writers.rank]
    with new_folder(Path(target), files, writers) as folder:
        if writers.rank == 0:
            _copy_extra_files(source, folder, config)
            write_config(config, folder, source, dtype=plan[0].dtype, has_value_head=role != "policy")
        output = TensorFiles(folder, [file for file in files if file.writer == writers.rank])
        for stored in extras if last_writer == writers.rank else ():
            value = torch.empty(stored.shape, dtype=stored.dtype)
            read_slice(stored, 0, 0, stored.shape[0], value)
            output.write(stored.name, value)
        assembly = _Assembly(config, own, tp_size, output)
        for name, shards in tensors:
            if name == "output_layer.weight" and config.has_tied_head:
                continue
            assembly.add(name, shards)
        assembly.finish()
        output.sync()


def _plan(
    weights: Sequence[Weight],
    config: GLMConfig,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    writers: Writers,
) -> list[PlannedTensor]:
    plan = []
    for weight in weights:
        writer = writer_of(weight.name, config, writers)
        for name, shape in names_within(weight, config).items():
            kind = dtype[name] if isinstance(dtype, Mapping) else dtype
            kind = torch.float32 if weight.section == "value_head" else check_float(kind)
            plan.append(PlannedTensor(name=name, dtype=kind, shape=shape, writer=writer))
    return plan


def writer_of(name: str, config: GLMConfig, writers: Writers) -> int:
    """Return the writer that exports a parameter: that of its layer.

    The embedding belongs to the first layer, the final norm and the head to the last.
    """
    layer = config.num_layers - 1
    if name.startswith("embedding."):
        layer = 0
    elif name.startswith("decoder.layers."):
        layer = int(name.split(".")[2])
    return writers.of_layer(layer, config.num_layers)


def _non_weight_tensors(source: str | Path | None, config: GLMConfig) -> list[FileTensor]:
    if source is None or config.family != "chatglm" or read_config(source).family != "chatglm":
        return []
    stored = list_tensors(Path(source)).values() if has_weights(Path(source)) else ()
    return [item for item in stored if item.dtype and NOT_WEIGHTS["chatglm"].fullmatch(item.name)]


def _copy_extra_files(source: str | Path | None, folder: Path, config: GLMConfig) -> None:
    if source is None:
        return
    origin = open_folder(source)
    patterns = _EXTRA_FILES
    if read_config(origin).family == config.family:
        patterns += _EXTRA_FILES_WITHIN_FAMILY
    for name in sorted({path.name for pattern in patterns for path in origin.glob(pattern)}):
        if not (origin / name).is_dir():
            file = plain_file(origin, name)
            with name_in_errors(file):
                content = file.read_bytes()
            write_synced(folder / name, content)


def read_extra_files(
    source: str | Path, config: GLMConfig, *, dtype: torch.dtype, role: Role
) -> dict[str, bytes]:
    """Return config, tokenizer and other files of a model folder except its weights, by name.

    Raises:
        ModelFolderError: the source is unusable.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy_extra_files(source, folder, config)
        write_config(config, folder, source, dtype=dtype, has_value_head=role in SCALAR_ROLES)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class _Assembly:
    """Parameters, each of which goes to its places in the files as soon as all its shards have come."""

    def __init__(
        self, config: GLMConfig, weights: Sequence[Weight], tp_size: int, output: TensorFiles
    ) -> None:
        self._output = output
        self._expected: dict[str, list[ParamShard]] = {}
        self._tp_size = tp_size
        for weight in weights:
            for rank in range(tp_size):
                for shard in shards_of(weight, config, tp_rank=rank, tp_size=tp_size):
                    self._expected.setdefault(shard.name, []).append(shard)

    def add(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Take one parameter of all ranks and write it."""
        if name not in self._expected:
            raise ValueError(f"{name} is not a parameter that this writer exports, or it was given before")
        if len(tensors) != self._tp_size:
            raise ValueError(
                f"{name} came as {len(tensors)} tensors; {self._tp_size} are required, one a rank"
            )
        pieces: dict[HfSlice, torch.Tensor] = {}
        for rank, (shard, tensor) in enumerate(zip(self._expected.pop(name), tensors, strict=True)):
            for piece, value in place_shard(shard, tensor.detach()):
                if piece in pieces:
                    _compare_replica(pieces[piece], value, self._dtype(piece.name), name, rank)
                else:
                    pieces[piece] = value
        columns: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for piece, value in pieces.items():
            if piece.dim == 0:
                self._write(piece.name, piece.start, [(0, value)])
            else:
                columns.setdefault(piece.name, []).append((piece.start, value))
        for hf_name, parts in columns.items():
            self._write(hf_name, 0, parts)

    def finish(self) -> None:
        """Check that every parameter was added."""
        if self._expected:
            names = ", ".join(list(self._expected)[:3])
            raise ValueError(f"{len(self._expected)} parameters were not given for the export, first {names}")

    def _dtype(self, name: str) -> torch.dtype:
        return FLOAT_DTYPES[self._output.entries[name].dtype]

    def _write(self, name: str, start: int, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Write rows of a tensor from `start` on, given as (first column, all these rows of some columns).

        Rows that lie in host memory as they are in the file are written from there; others some at a time.
        """
        dtype, (_, first) = self._dtype(name), parts[0]
        if len(parts) == 1 and first.device.type == "cpu" and first.dtype == dtype and first.is_contiguous():
            self._output.write(name, first, start)
            return
        columns = self._output.entries[name].shape[1:]
        step = max(1, _BLOCK_BYTES // (prod(columns) * dtype.itemsize))
        for row in range(0, len(first), step):
            block = torch.empty(min(step, len(first) - row), *columns, dtype=dtype)
            for column, value in parts:
                place = block.narrow(1, column, value.shape[1]) if columns else block
                copy_checked(place, value[row : row + step], name)
            self._output.write(name, block, start + row)


def _compare_replica(
    first: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, parameter: str, rank: int
) -> None:
    first, other = (value.to(device="cpu", dtype=dtype).contiguous() for value in (first, other))
    if not torch.equal(first.view(torch.uint8), other.view(torch.uint8)):
        gap = (first.float() - other.float()).abs().max().item()
        warnings.warn(
            f"{parameter} is replicated, and its copy on tensor-parallel rank {rank} differs from the first "
            f"by up to {gap:.3g}; the first is exported",
            stacklevel=2,
        )
