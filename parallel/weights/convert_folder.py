"""Conversion of a Hugging Face folder to another family's form, another type, or other file sizes.

`chatglm` and `glm` are two forms of one architecture and convert both ways. `glm4` has additional norms, so
it converts only to itself. With the same family and type, every tensor keeps its bytes.

The chatglm form needs the remote code in the model's folder; a folder converted from `glm` has a config that
names this code (`configuration_chatglm.py`, `modeling_chatglm.py`), and the files must be added.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from glm_rlhf.parallel.spec.model_config import Family, GLMConfig
from glm_rlhf.parallel.spec.weight_map import (
    SCALAR_BIAS,
    SCALAR_ROLES,
    TABLES,
    Role,
    has_scalar_bias,
    trains_scalar_bias,
    weights_of,
)
from glm_rlhf.parallel.storage.folder_writer import Writers
from glm_rlhf.parallel.storage.hf_config import names_scalar_class, read_config
from glm_rlhf.parallel.storage.model_folder import ModelFolderError, open_folder
from glm_rlhf.parallel.storage.weight_files import list_tensors
from glm_rlhf.parallel.weights.hf_reader import ShardStream, iterate_shard, with_stored_score_bias
from glm_rlhf.parallel.weights.hf_writer import export_tensors, writer_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Target types of a conversion, in addition to `same`."""


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    family: Family | None = None,
    dtype: str = "same",
    max_shard_bytes: int = 5_000_000_000,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] | None = None,
) -> None:
    """Convert a model folder; the new one appears atomically when it is complete.

    Runs in one process, or in several on one file system, each of which converts a part of the layers; then
    all of them call this, and each calls `barrier` three times. On a terminal a bar shows rank 0's progress.

    Args:
        source: Hugging Face folder of any supported form: safetensors or `.bin`, one file or many, a language
            model or one with a scalar head.
        target: the new folder; it must not exist, or be empty.
        family: form of the new folder; `None` keeps the source's.
        dtype: `same`, `bf16`, `fp16` or `fp32`. Float32 to 16 bits rounds; a value that would become infinite
            is an error. A value head is always float32.
        max_shard_bytes: largest file, except for single larger tensors.
        rank: this process among the converting ones.
        world: number of converting processes.
        barrier: returns when all of them have called it; required with several processes.

    Raises:
        ModelFolderError: the source is damaged or not such a model, or the target exists.
        ValueError: the families' architectures differ, or an argument is not one of those above.
    """
    origin = open_folder(source)
    config = read_config(origin)
    role = role_of(origin, config)
    if role in SCALAR_ROLES:
        config = with_stored_score_bias(config, origin)
    new_config = _in_family(config, family or config.family)
    if dtype != "same" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be same, {', '.join(DTYPES)}")
    writers = (
        Writers(rank=rank, count=world)
        if barrier is None
        else Writers(rank=rank, count=world, barrier=barrier)
    )
    whole = iterate_shard(origin, config, tp_rank=0, tp_size=1, layers=range(config.num_layers), role=role)
    added: dict[str, torch.Tensor] = {}
    if role in SCALAR_ROLES and new_config.family != config.family:
        bias = _scalar_bias(whole)
        new_config = replace(
            new_config, has_score_bias=not trains_scalar_bias(new_config) and bool(bias.item())
        )
        whole = replace(whole, shards=tuple(shard for shard in whole.shards if shard.name != SCALAR_BIAS))
        if has_scalar_bias(new_config):
            added = {SCALAR_BIAS: bias}
    own = [shard for shard in whole.shards if writer_of(shard.name, config, writers) == rank]
    own_added = [(name, [value]) for name, value in added.items() if writer_of(name, config, writers) == rank]
    export_tensors(
        target,
        new_config,
        chain(_with_progress(replace(whole, shards=tuple(own)), rank), own_added),
        tp_size=1,
        dtype=DTYPES[dtype] if dtype in DTYPES else _dtypes_as_stored(whole, config, new_config, role),
        role=role,
        without=tuple(name for name in whole.missing if name not in added),
        max_shard_bytes=max_shard_bytes,
        source=origin,
        writers=writers,
    )


def _in_family(config: GLMConfig, family: Family) -> GLMConfig:
    if family not in TABLES:
        raise ValueError(f"family is {family!r}; it must be one of {', '.join(TABLES)}")
    if "glm4" in (family, config.family) and family != config.family:
        raise ValueError(
            f"a {config.family} model cannot become {family}: glm4 norms the output of attention and MLP, "
            "the others do not; convert to the same family"
        )
    return replace(
        config, family=family, has_interleaved_qkv=config.has_interleaved_qkv and family == "chatglm"
    )


def _scalar_bias(whole: ShardStream) -> torch.Tensor:
    """Return the bias of a folder's scalar head, [1], fp32; 0 where it has none."""
    own = tuple(shard for shard in whole.shards if shard.name == SCALAR_BIAS)
    return next((tensor for _, tensor in replace(whole, shards=own)), torch.zeros(1))


def role_of(folder: Path, config: GLMConfig) -> Role:
    """Return the role for a folder's head: policy, or reward for the scalar head of a reward model or critic.

    A folder may hold both: the class of a reward model in ChatGLM's own code keeps the vocabulary head. There
    `architectures` of config.json decides.

    Raises:
        ModelFolderError: it holds both heads, and config.json names no class.
    """
    stored = list_tensors(folder)
    heads = {
        row.section: row.hf_names[0]
        for row in TABLES[config.family]
        if row.name in ("output_layer.weight", "value_head.weight") and row.hf_names[0] in stored
    }
    if len(heads) > 1:
        is_scalar = names_scalar_class(folder)
        if is_scalar is None:
            raise ModelFolderError(
                f"{folder} holds both {' and '.join(heads.values())}, and config.json names no class under "
                "architectures: name it there, or remove one of the two heads"
            )
        return "reward" if is_scalar else "policy"
    return "reward" if "value_head" in heads else "policy"


def _dtypes_as_stored(
    whole: ShardStream, config: GLMConfig, new_config: GLMConfig, role: Role
) -> Mapping[str, torch.dtype]:
    dtypes = {}
    for weight in weights_of(new_config, layers=range(config.num_layers), role=role):
        for name in weight.hf_names:
            if config.family == new_config.family and name in whole.tensors:
                dtypes[name] = whole.tensors[name].dtype
            else:
                dtypes[name] = whole.dtypes.get(weight.name, torch.float32)
    return dtypes


def _with_progress(stream: ShardStream, rank: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    disable = True if rank else None  # None: no bar unless the output is a terminal
    for name, tensor in tqdm(
        stream, total=len(stream.shards), desc="convert", unit="tensor", disable=disable
    ):
        yield name, [tensor]
