"""The manifest of a checkpoint, `manifest.json`, validated before it is used.

A checkpoint is a folder:

    manifest.json            layout, config, versions, the engine's state, size and SHA-256 of all other files
    rank_00000.safetensors   what rank 0 owned: parts of flattened parameters, and tensors of the rank itself
    …
    config.json, tokenizer…  of the first model, so that the folder can be used as a model folder

Nothing in it is ever executed: JSON and safetensors are data. A tensor `policy/exp_avg/decoder.layers.0.…`
holds consecutive elements of rank r's flattened parameter, from the element given in `starts`.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.weight_map import SCALAR_ROLES, Role
from glm_rlhf.parallel.storage.model_folder import ModelFolderError, plain_file
from glm_rlhf.parallel.storage.safetensors_format import FLOAT_DTYPES
from glm_rlhf.parallel.storage.text_files import read_json

FILE_NAME = "manifest.json"
FORMAT = 1
_MAX_BYTES = 2**28
_LARGEST_LAYERS, _LARGEST_SIZE = 1024, 2**24
"""Far above any model, so that a damaged number is refused."""
_CHECKSUM = "checksum"
_EXTRA_FILES = "companions"  # its name in files of format 1

WEIGHT = "weight"
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of tensors: weights, and the first and second Adam moment."""


class CheckpointError(ModelFolderError):
    """A checkpoint cannot be used or written; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """Size and checksum of a file."""

    num_bytes: int
    """Size."""
    sha256: str
    """Checksum of the content, hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """The file of one rank."""

    facts: FileInfo
    """Size and checksum."""
    tp_rank: int
    """The rank's position on the tensor-parallel axis."""
    starts: dict[str, dict[str, int]]
    """Per model and parameter with elements in the file: the first of these elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One model of the checkpoint."""

    role: Role
    """Role, which determines the head."""
    config: GLMConfig
    """Shape."""
    dtype: str
    """Type of its weights in training, as safetensors names it, such as `BF16`; they are stored in fp32."""
    num_steps: int
    """Optimizer steps taken."""
    frozen: tuple[str, ...]
    """Names of the frozen weights, which have no moments."""
    gradient_squares: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = field(
        default_factory=dict
    )
    """Squared norms of the last gradient per bucket, by the bucket's name; an optimizer in backward clips its
    next step by them."""

    @property
    def has_moments(self) -> bool:
        """Whether Adam moments are stored; an optimizer in backward has them before its first step."""
        return self.num_steps > 0 or bool(self.gradient_squares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest."""

    format: int
    """Version of the format."""
    step: int
    """Completed steps of the run."""
    layout: Layout
    """Of the run that wrote it."""
    world_size: int
    """Ranks of that run."""
    versions: dict[str, str]
    """Of the project, Python, torch and Megatron-core."""
    models: dict[str, ModelInfo]
    """The models by name; used as a model folder, the checkpoint is the first one."""
    ranks: tuple[RankFile, ...]
    """The file of each rank, in order."""
    extra_files: Annotated[dict[str, FileInfo], Field(alias=_EXTRA_FILES)]
    """Other files."""
    config: dict[str, Any]
    """Settings of the run, as JSON values."""
    state: dict[str, Any]
    """Further state that the engine needs to resume, as JSON values."""

    @property
    def files(self) -> dict[str, FileInfo]:
        """Every file except the manifest, by name."""
        rank_files = {rank_file_name(rank): file.facts for rank, file in enumerate(self.ranks)}
        return rank_files | self.extra_files


_ADAPTER = TypeAdapter(Manifest)


def rank_file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has a checkpoint's manifest, valid or not."""
    return (folder / FILE_NAME).exists()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the file's content; equal manifests give equal bytes."""
    values = asdict(manifest)
    values[_EXTRA_FILES] = values.pop("extra_files")
    values[_CHECKSUM] = _checksum(values)
    return json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest, after checking its own checksum and the type of every value.

    Raises:
        CheckpointError: it is missing, a link, damaged, or of another version.
    """
    try:
        path = plain_file(folder, FILE_NAME)
        values = read_json(path, max_bytes=_MAX_BYTES, allows_nonfinite=True)
        checksum = values.pop(_CHECKSUM, None)
        if checksum != _checksum(values):
            raise CheckpointError(f"{path} is damaged: its checksum differs from its content")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has the format {values.get('format')!r}; this version reads {FORMAT}"
            )
        _note_score_biases(values)
        manifest = _ADAPTER.validate_json(json.dumps(values), strict=True)
    except CheckpointError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{folder / FILE_NAME}: {location}: {first['msg']}") from None
    except (ModelFolderError, OSError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {error}") from None
    _check(manifest, folder)
    return manifest


def _note_score_biases(values: dict[str, Any]) -> None:
    """Say of the critics and reward models of versions before 0.2 that their scalar heads have a bias."""
    models = values.get("models")
    for info in models.values() if isinstance(models, dict) else ():
        config = info.get("config") if isinstance(info, dict) else None
        if (
            isinstance(config, dict)
            and info.get("role") in SCALAR_ROLES
            and config.get("family") != "chatglm"
        ):
            config.setdefault("has_score_bias", True)


def _check(manifest: Manifest, folder: Path) -> None:
    path = folder / FILE_NAME
    if not manifest.models:
        raise CheckpointError(f"{path} names no model")
    if len(manifest.ranks) != manifest.world_size or manifest.world_size < 1:
        raise CheckpointError(
            f"{path} lists {len(manifest.ranks)} files of ranks for a world of {manifest.world_size}"
        )
    for model, info in manifest.models.items():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{path}: the weights of {model} have the unknown type {info.dtype!r}")
        counts = [value for value in asdict(info.config).values() if isinstance(value, int)]
        if info.config.num_layers > _LARGEST_LAYERS or max(counts) > _LARGEST_SIZE:
            raise CheckpointError(f"{path}: the shape of {model} is beyond any model's: {info.config}")
    try:
        manifest.layout.dp(manifest.world_size)
        for info in manifest.models.values():
            manifest.layout.check_model(info.config)
    except ValueError as error:
        raise CheckpointError(f"{path} describes no possible run: {error}") from None


def current_versions() -> dict[str, str]:
    """Return the versions that a manifest records."""
    versions = {"python": platform.python_version()}
    for name in ("glm-rlhf", "torch", "megatron-core"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
