"""A Hugging Face folder, written tensor by tensor from tensor-parallel shards.

Names, shapes and types are known before the first tensor comes, so every file's header is written first and each
tensor goes to its place as soon as its shards are together: memory holds one tensor, in whatever order they come.
The folder grows under a hidden name beside the target and is renamed when it is whole.

Several processes can write at once: every layer has one writer, which alone writes the files of its layers, and a
barrier stands between the steps. What is exported:
  - weights under the family's names, the value head as `score.weight` and `score.bias` in float32;
  - `config.json`, and from a source folder the tokenizer, generation settings, licence, and of the same family
    the remote code;
  - ChatGLM's `inv_freq` where a source of the same family has it: it is no weight, but the remote code counts it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from .glm_config import GLMConfig
from .hf_config import write_config
from .model_folder import ModelFolderError, open_folder, plain_file
from .names import NOT_WEIGHTS, Role, Weight, names_within, weights_of
from .safetensors_header import HeaderEntry, check_float, plan_file
from .sharding import Shard, place_shard, shards_of
from .weight_files import copy_checked, list_tensors, read_slice

_COPIED = (
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
_COPIED_WITHIN_FAMILY = ("configuration_*.py", "modeling_*.py", "quantization.py")


def _no_barrier() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """Who writes what, where several processes share the work on one file system."""

    rank: int = 0
    """This process among the writers."""
    count: int = 1
    """Number of writers."""
    barrier: Callable[[], None] = _no_barrier
    """Returns when all writers have called it."""
    writer_of_layer: Sequence[int] | None = None
    """Writer of each layer; the first layer's takes the embedding, the last one's norm and head. `None`: even."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ValueError(f"rank is {self.rank}; with {self.count} writers it must be 0 to {self.count - 1}")
        if self.count > 1 and self.barrier is _no_barrier:
            raise ValueError(f"{self.count} writers need a barrier, such as torch.distributed.barrier")

    def of(self, weight: Weight, config: GLMConfig) -> int:
        """Return the writer of one weight."""
        last = config.num_layers - 1
        layer = 0 if weight.place == "embedding" else last
        if weight.place == "layer":
            layer = int(weight.ours.split(".")[2])
        if self.writer_of_layer is not None:
            return self.writer_of_layer[layer]
        return layer * self.count // config.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One safetensors file of an export."""

    name: str
    """File name."""
    writer: int
    """Which process writes it."""
    prefix: bytes
    """Length prefix and header."""
    entries: Mapping[str, HeaderEntry]
    """Where each tensor goes."""


def plan_files(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...], int]], max_shard_bytes: int
) -> list[PlannedFile]:
    """Return the files that hold `tensors` in order, none above `max_shard_bytes` unless one tensor is.

    Args:
        tensors: (their name, dtype, shape, writer); a new file begins where the writer changes.
        max_shard_bytes: largest sum of tensor bytes in a file.

    Raises:
        ValueError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    groups: list[tuple[int, dict[str, tuple[torch.dtype, tuple[int, ...]]]]] = []
    room = 0
    for name, dtype, shape, writer in tensors:
        num_bytes = prod(shape) * dtype.itemsize
        if not groups or groups[-1][0] != writer or num_bytes > room:
            groups.append((writer, {}))
            room = max_shard_bytes
        groups[-1][1][name] = (dtype, shape)
        room -= num_bytes
    files = []
    for index, (writer, group) in enumerate(groups, start=1):
        prefix, entries = plan_file(group)
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        files.append(PlannedFile(name=name, writer=writer, prefix=prefix, entries=entries))
    return files


def export_tensors(
    target: str | Path,
    config: GLMConfig,
    tensors: Iterable[tuple[str, Sequence[torch.Tensor]]],
    *,
    tp_size: int,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    role: Role = "policy",
    max_shard_bytes: int = 5_000_000_000,
    source: str | Path | None = None,
    writers: Writers | None = None,
) -> None:
    """Write a Hugging Face folder of the config's family.

    Every writer calls it with the tensors of its own layers; the barrier of `writers` is passed three times. A
    tied head's copy on the last stage may be among the tensors and is left out.

    Args:
        target: the new folder; it must not exist, or be empty.
        config: the model.
        tensors: (our name, one tensor a tensor-parallel rank, in order), each parameter once, in any order, on any
            device. Of replicated parameters the first rank's copy counts; where another differs, a warning says so.
        tp_size: number of tensors that come with each name.
        dtype: of the files; a mapping gives one by their name. The value head is float32.
        role: what ends the model.
        max_shard_bytes: largest file, apart from single tensors that are larger.
        source: folder whose tokenizer, settings and other config keys are carried over.
        writers: how processes share the work; `None` is this one alone.

    Raises:
        ModelFolderError: the target exists, or the disk has too little room.
        ValueError: a parameter is missing, unknown, twice, of another shape, or does not fit the type.
    """
    writers = writers or Writers()
    weights = weights_of(config, layers=range(config.num_layers), role=role)
    extras = _copied_tensors(source, config) if writers.rank == 0 else {}
    files = plan_files(_planned_tensors(weights, config, dtype, writers), max_shard_bytes)
    own = [weight for weight in weights if writers.of(weight, config) == writers.rank]
    with _temporary_folder(Path(target), files, writers) as folder:
        output = _Output(folder=folder, files=[file for file in files if file.writer == writers.rank])
        output.begin()
        assembly = _Assembly(config=config, weights=own, tp_size=tp_size, output=output)
        for name, shards in tensors:
            if name == "output_layer.weight" and config.has_tied_head:
                continue
            assembly.add(name, shards)
        assembly.finish()
        writers.barrier()
        if writers.rank == 0:
            _check_written(folder, files)
            _write_extras(folder, files, extras)
            kind = next(iter({entry.dtype for file in files for entry in file.entries.values()}))
            write_config(config, folder, source, dtype=_main_dtype(files), has_value_head=role != "policy")
            _copy_companions(source, folder, config)
