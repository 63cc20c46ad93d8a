"""What a checkpoint says of itself: `manifest.json`, checked before anything is believed.

A checkpoint is a folder:

    manifest.json            layout, config, versions, the engine's state, size and SHA-256 of all else
    rank_00000.safetensors   what rank 0 owned: parts of flattened parameters, and tensors of the rank itself
    …
    config.json, tokenizer…  of the first model, so that the folder serves wherever a model folder does

Nothing in it is ever run: JSON and safetensors are data. A tensor `policy/exp_avg/decoder.layers.0.…` holds
some consecutive elements of rank r's flattened parameter, the first of which `starts` gives.
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
from glm_rlhf.parallel.spec.weight_map import Role
from glm_rlhf.parallel.storage.model_folder import ModelFolderError, parse_json_object, plain_file
from glm_rlhf.parallel.storage.safetensors_format import FLOAT_DTYPES

FILE_NAME = "manifest.json"
FORMAT = 1
_MAX_BYTES = 2**28
_LARGEST_LAYERS, _LARGEST_SIZE = 1024, 2**24
"""Far above any model, so that a damaged number is not believed."""
_CHECKSUM = "checksum"
_EXTRA_FILES = "companions"  # its name in files of format 1

WEIGHT = "weight"
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of tensors: weights, and Adam's running mean of the gradient and of its square."""


class CheckpointError(ModelFolderError):
    """A checkpoint cannot be used or written; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What a file must be."""

    num_bytes: int
    """Its size."""
    sha256: str
    """Checksum of its content, hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """The file of one rank."""

    facts: FileInfo
    """Size and checksum."""
    tp_rank: int
    """The rank's place on the tensor-parallel axis."""
    starts: dict[str, dict[str, int]]
    """Of each model, of each parameter that has elements in the file: the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One model of the checkpoint."""

    role: Role
    """What it ends in."""
    config: GLMConfig
    """Its shape."""
    dtype: str
    """The format's name of the type of its weights in training, such as `BF16`; they are stored in fp32."""
    num_steps: int
    """Optimizer steps taken."""
    frozen: tuple[str, ...]
    """Our names of the weights that are not trained, and have no moments."""
    gradient_squares: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = field(
        default_factory=dict
    )
    """Squared norms of parts of the last gradient, by what names of weights begin with; of an optimizer in
    backward, which clips by them."""

    @property
    def has_moments(self) -> bool:
        """Whether Adam's moments are stored; an optimizer in backward has them before its first step."""
        return self.num_steps > 0 or bool(self.gradient_squares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of it."""

    format: int
    """Version of this form."""
    step: int
    """Steps of the run behind it."""
    layout: Layout
    """Of the run that wrote it."""
    world_size: int
    """Ranks of that run."""
    versions: dict[str, str]
    """Of the project, Python, torch and Megatron-core."""
    models: dict[str, ModelInfo]
    """The models by name; the first one is what the folder is as a model folder."""
    ranks: tuple[RankFile, ...]
    """The files, rank by rank."""
    extra_files: Annotated[dict[str, FileInfo], Field(alias=_EXTRA_FILES)]
    """Other files."""
    config: dict[str, Any]
    """Settings of the run, as JSON values."""
    state: dict[str, Any]
    """What else the engine needs to go on, as JSON values."""

    @property
    def files(self) -> dict[str, FileInfo]:
        """Every file but the manifest by name."""
        of_ranks = {rank_file_name(rank): file.facts for rank, file in enumerate(self.ranks)}
        return of_ranks | self.extra_files


_ADAPTER = TypeAdapter(Manifest)


def rank_file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder claims to be a checkpoint of ours, sound or not."""
    return (folder / FILE_NAME).exists()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the file's content; equal manifests give equal bytes."""
    values = asdict(manifest)
    values[_EXTRA_FILES] = values.pop("extra_files")
    values[_CHECKSUM] = _checksum(values)
    return json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest, its own checksum and the form of every value checked.

    Raises:
        CheckpointError: it is missing, a link, damaged, or of another version.
    """
    try:
        path = plain_file(folder, FILE_NAME)
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; a manifest has at most {_MAX_BYTES}"
            )
        text = path.read_bytes().decode("utf-8")
        values = parse_json_object(text, what=str(path))
        found = values.pop(_CHECKSUM, None)
        if found != _checksum(values):
            raise CheckpointError(f"{path} is damaged: its checksum differs from its content")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has the format {values.get('format')!r}; this version reads {FORMAT}"
            )
        manifest = _ADAPTER.validate_json(json.dumps(values), strict=True)
    except CheckpointError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{folder / FILE_NAME}: {place}: {first['msg']}") from None
    except (ModelFolderError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from None
    _check(manifest, folder)
    return manifest


def _check(manifest: Manifest, folder: Path) -> None:
    path = folder / FILE_NAME
    if not manifest.models:
        raise CheckpointError(f"{path} names no model")
    if len(manifest.ranks) != manifest.world_size or manifest.world_size < 1:
        raise CheckpointError(
            f"{path} lists {len(manifest.ranks)} files of ranks for a world of {manifest.world_size}"
        )
    for model, facts in manifest.models.items():
        if facts.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{path}: the weights of {model} have the unknown type {facts.dtype!r}")
        counts = [value for value in asdict(facts.config).values() if isinstance(value, int)]
        if facts.config.num_layers > _LARGEST_LAYERS or max(counts) > _LARGEST_SIZE:
            raise CheckpointError(f"{path}: the shape of {model} is beyond any model's: {facts.config}")
    try:
        manifest.layout.dp(manifest.world_size)
        for facts in manifest.models.values():
            manifest.layout.check_model(facts.config)
    except ValueError as error:
        raise CheckpointError(f"{path} describes no possible run: {error}") from None


def current_versions() -> dict[str, str]:
    """Return the versions that a manifest notes."""
    versions = {"python": platform.python_version()}
    for name in ("glm-rlhf", "torch", "megatron-core"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
