"""One rank's weights, streamed from a Hugging Face folder.

    stream = iterate_shard(folder, config, tp_rank=0, tp_size=2, layers=range(28), dtype=torch.bfloat16)
    stream.read_into(parameters)
    for name in stream.missing:  # a scalar head that is missing in the folder: initialise it
        ...

All headers are checked before the first tensor is read. Parameters in host memory of the stored type are
read in place; otherwise only the current tensor is in memory, in addition to those that the caller keeps.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.sharding import HfSlice, ParamShard, read_shard, read_shard_into, shards_of
from glm_rlhf.parallel.spec.weight_map import (
    NOT_WEIGHTS,
    SCALAR_BIAS,
    TABLES,
    Role,
    Weight,
    names_within,
    trains_scalar_bias,
    weights_of,
)
from glm_rlhf.parallel.storage.model_folder import ModelFolderError, open_folder
from glm_rlhf.parallel.storage.safetensors_format import check_float
from glm_rlhf.parallel.storage.weight_files import FileTensor, list_tensors, read_slice

_NUM_THREADS = 4
"""Threads that read parameters in host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStream:
    """One rank's parameters in a folder; each iteration reads them again."""

    shards: tuple[ParamShard, ...]
    """Parameters that the folder provides, in order."""
    missing: tuple[str, ...]
    """Names of parameters that the caller must initialise: only those of the value head can be missing."""
    dtypes: Mapping[str, torch.dtype]
    """Type of each parameter by our name."""
    tensors: Mapping[str, FileTensor]
    """Their tensors by name."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, new CPU tensor)."""
        for shard in self.shards:
            yield shard.name, read_shard(shard, self._read, dtype=self.dtypes[shard.name])

    def read_into(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fill one tensor per shard, by name, on any device and of any type.

        Raises:
            KeyError: a shard's parameter is missing.
            ModelFolderError: a file was truncated since its header was read.
            ValueError: a parameter has a wrong shape, or a value does not fit its type.
        """
        targets = [(shard, parameters[shard.name].detach()) for shard in self.shards]
        on_host = [target for target in targets if target[1].device.type == "cpu"]
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read") as readers:
            for _ in readers.map(lambda target: read_shard_into(target[0], self._read, target[1]), on_host):
                pass
        staging = torch.empty(0, dtype=torch.uint8)
        for shard, parameter in targets:
            if parameter.device.type == "cpu":
                continue
            dtype = self.dtypes[shard.name]
            num_bytes = prod(shard.shape) * dtype.itemsize
            if staging.numel() < num_bytes:
                staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=parameter.is_cuda)
            host = staging[:num_bytes].view(dtype).view(shard.shape)
            read_shard_into(shard, self._read, host)
            parameter.copy_(host)

    def _read(self, piece: HfSlice, out: torch.Tensor) -> None:
        read_slice(self.tensors[piece.name], piece.dim, piece.start, piece.stop, out)


def iterate_shard(
    folder: str | Path,
    config: GLMConfig,
    *,
    tp_rank: int,
    tp_size: int,
    layers: Iterable[int],
    has_embedding: bool = True,
    has_head: bool = True,
    role: Role = "policy",
    dtype: torch.dtype | None = None,
) -> ShardStream:
    """Return a stream of (name, tensor) of one rank's parameters; it reads only their slices.

    No communication: every rank calls it with its own position. The whole folder is checked on every rank, so
    that all ranks find the same errors.

    Args:
        folder: Hugging Face model folder of the config's family.
        config: result of `read_config`.
        tp_rank: tensor-parallel rank.
        tp_size: tensor-parallel size.
        layers: this rank's layers, as indices in the whole model.
        has_embedding: whether this rank embeds tokens.
        has_head: whether this rank has the final norm and the role's head.
        role: `policy` reads the vocabulary head; `critic` and `reward` the value head if there is one.
        dtype: of the tensors; `None` keeps the folder's. The value head is always float32.

    Raises:
        ModelFolderError: the folder is damaged, or holds another model; the message names the tensor.
        ValueError: the model cannot be split this way.
    """
    if dtype is not None:
        check_float(dtype)
    path = open_folder(folder)
    tensors = check_weights(path, config, role=role)
    weights = weights_of(config, layers=layers, has_embedding=has_embedding, has_head=has_head, role=role)
    shards, missing, dtypes = [], [], {}
    for weight in weights:
        parts = shards_of(weight, config, tp_rank=tp_rank, tp_size=tp_size)
        if any(name not in tensors for name in weight.hf_names):
            missing += [part.name for part in parts]
            continue
        shards += parts
        dtypes |= {part.name: _dtype_of(weight, tensors, dtype) for part in parts}
    return ShardStream(shards=tuple(shards), missing=tuple(missing), dtypes=dtypes, tensors=tensors)


def with_stored_score_bias(config: GLMConfig, folder: Path) -> GLMConfig:
    """Return the config of a critic or reward model in a folder: whether it holds a `score.bias` that counts.

    A bias of 0 does not: no score differs without it.

    Args:
        config: result of `read_config`.
        folder: Hugging Face model folder, or a training checkpoint.

    Raises:
        ModelFolderError: the folder is damaged.
    """
    if trains_scalar_bias(config):
        return config
    names = {row.name: row.hf_names[0] for row in TABLES[config.family]}
    stored = list_tensors(folder).get(names[SCALAR_BIAS])
    if stored is None or stored.shape != (1,) or stored.dtype is None:
        # One of another form is refused later, with the other weights.
        return replace(config, has_score_bias=stored is not None)
    value = torch.zeros(1)
    read_slice(stored, 0, 0, 1, value)
    return replace(config, has_score_bias=bool(value.item()))


def check_weights(folder: Path, config: GLMConfig, *, role: Role) -> dict[str, FileTensor]:
    """Return the folder's tensors, known to be those of the model: all there, of the right shapes, none
    besides.

    Tensors that the role does not use, such as the vocabulary head of a critic, are optional; so are the
    family's tensors that are no weights.

    Args:
        folder: Hugging Face model folder.
        config: the model.
        role: determines the required head; a value head is always optional.

    Raises:
        ModelFolderError: names the tensor, what the folder holds and what is required.
    """
    tensors = list_tensors(folder)
    weights = weights_of(config, layers=range(config.num_layers), role=role)
    for name, stored in tensors.items():
        if origin := _written_by(name):
            raise ModelFolderError(f"{stored.path} holds the tensor {name!r:.200}, {origin}")
    required = _expected(config, weights)
    optional = _expected(config, [weight for weight in weights if weight.section == "value_head"])
    for name, shape in required.items():
        if name not in tensors and name not in optional:
            raise ModelFolderError(
                f"{folder} has no tensor {name!r}; {list(shape)} is required{_why_missing(name, role)}"
            )
    known = required | _expected(config, _of_other_roles(config))
    for name, stored in tensors.items():
        if NOT_WEIGHTS[config.family].fullmatch(name):
            continue
        if name not in known:
            raise ModelFolderError(
                f"{stored.path} holds the tensor {name!r} {list(stored.shape)}, which a {config.family} "
                f"model of {config.num_layers} layers does not have; is config.json of another model?"
            )
        if stored.dtype is None:
            raise ModelFolderError(
                f"{stored.path} holds {name!r} as {stored.dtype_name}; a floating-point type of 16 bits or "
                "more is required, so fetch the model that is not quantised"
            )
        is_like = len(stored.shape) == len(known[name]) and stored.shape[1:] == known[name][1:]
        if name in optional and is_like and stored.shape[0] != 1:
            raise ModelFolderError(
                f"{stored.path} holds {name!r} with {stored.shape[0]} rows, a head of so many labels; a "
                "critic or reward model has one: train it with num_labels 1, or with the command reward"
            )
        if stored.shape != known[name]:
            raise ModelFolderError(
                f"{stored.path} holds {name!r} with the shape {list(stored.shape)} where config.json "
                f"requires {list(known[name])}"
            )
    return tensors


def _expected(config: GLMConfig, weights: list[Weight]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        shapes |= names_within(weight, config)
    return shapes


def _of_other_roles(config: GLMConfig) -> list[Weight]:
    """Return the heads of every role; also a tied one, which some folders store a second time, and a bias."""
    stored = replace(config, has_tied_head=False, has_score_bias=True)
    scalar = weights_of(stored, layers=(), has_embedding=False, role="reward")
    return scalar + weights_of(stored, layers=(), has_embedding=False, role="policy")


_LEAVE_PEFT = "merge the adapter into the base model with merge_and_unload(), and save that"
_FOREIGN_NAMES = (
    ("base_model.", f"whose prefix is that of peft: {_LEAVE_PEFT}"),
    (".lora_", f"which is part of a LoRA adapter of peft: {_LEAVE_PEFT}"),
    ("module.", "whose prefix is that of a parallel wrapper: save the model inside it, model.module"),
    ("_orig_mod.", "whose prefix is that of torch.compile: save the model inside it, model._orig_mod"),
    (
        "v_head.",
        "which is TRL's value head: save the model inside it, model.pretrained_model; a critic starts with a "
        "new head",
    ),
    ("pretrained_model.", "whose prefix is that of TRL: save the model inside it, model.pretrained_model"),
    (".qweight", "which is a quantised weight: fetch the model that is not quantised"),
)
"""Beginnings of names, and with a dot in front parts of names, that other programs give; and what to do."""


def _written_by(name: str) -> str | None:
    """Return what another program's tensor is and what to do about it; None for any other name."""
    for part, origin in _FOREIGN_NAMES:
        if part in name if part.startswith(".") else name.startswith(part):
            return origin
    return None


def _why_missing(name: str, role: Role) -> str:
    if role == "policy" and name in ("lm_head.weight", "transformer.output_layer.weight"):
        return ": a policy needs a vocabulary head, which a reward model's folder has not"
    return ""


def _dtype_of(weight: Weight, tensors: Mapping[str, FileTensor], dtype: torch.dtype | None) -> torch.dtype:
    if weight.section == "value_head":
        return torch.float32
    if dtype is not None:
        return dtype
    first, *others = (tensors[name].dtype for name in weight.hf_names)
    for other in others:  # query, key and value of different types: keep every bit
        first = torch.promote_types(first, other)
    return first
