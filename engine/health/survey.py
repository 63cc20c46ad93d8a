"""Versions, devices and fast paths that one rank finds on its machine."""

import json
import os
import platform
import re
import socket
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from glm_rlhf.parallel.fast_paths import FastPath, probe

PACKAGES = (
    "glm-rlhf",
    "torch",
    "megatron-core",
    "triton",
    "transformer-engine",
    "apex",
    "flash-attn",
    "transformers",
    "sentencepiece",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "pyarrow",
)
ABSENT = "not installed"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One piece of software."""

    name: str
    """Its name; of a package that of the distribution."""
    version: str
    """The version, or why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """The outcome of a small all-reduce over all ranks."""

    backend: str
    """`gloo` or `nccl`."""
    is_ok: bool
    """Whether the sum was right and in time."""
    detail: str
    """The time that it took, or the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSurvey:
    """Everything one rank reports."""

    rank: int
    """Its number in the world."""
    host: str
    """Name of its machine."""
    devices: tuple[str, ...]
    """Its devices."""
    versions: tuple[Version, ...]
    """Software, python first."""
    fast_paths: tuple[FastPath, ...]
    """Optional fast paths, active or not."""
    collectives: tuple[Collective, ...] = ()
    """One outcome per backend; empty for a single rank."""

    def to_json(self) -> str:
        """Return the survey as text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankSurvey":
        """Return the survey that `to_json` wrote."""
        parts = json.loads(text)
        kinds = {"versions": Version, "fast_paths": FastPath, "collectives": Collective}
        for name, kind in kinds.items():
            parts[name] = tuple(kind(**part) for part in parts[name])
        return cls(**{**parts, "devices": tuple(parts["devices"])})


def survey_rank(*, rank: int, local_rank: int | None) -> RankSurvey:
    """Return the survey of this rank, without collectives.

    Args:
        rank: its number in the world.
        local_rank: number of its device on the host; None lists all devices.
    """
    return RankSurvey(
        rank=rank,
        host=socket.gethostname(),
        devices=_devices(local_rank),
        versions=_versions(),
        fast_paths=probe(),
    )


def _versions() -> tuple[Version, ...]:
    installed = [Version(name=name, version=_package_version(name)) for name in PACKAGES]
    system = {
        "python": platform.python_version(),
        "CUDA": torch.version.cuda or "none, a CPU build of torch",
        "NVIDIA driver": _driver_version(),
        "NCCL": _nccl_version(),
    }
    first, *rest = [Version(name=name, version=text) for name, text in system.items()]
    return (first, *rest, *installed)


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def _driver_version() -> str:
    if not _DRIVER_FILE.exists():
        return "none found"
    text = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    match = re.search(r"NVRM version:.*?(\d+\.\d[\d.]*)", text)
    return match[1] if match else "unknown"


def _nccl_version() -> str:
    if not torch.distributed.is_nccl_available():
        return "none in this torch"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _devices(local_rank: int | None) -> tuple[str, ...]:
    num_devices = torch.cuda.device_count()
    if num_devices == 0:
        memory = psutil.virtual_memory().total / 2**30
        return (f"CPU, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB",)
    if local_rank is not None and local_rank >= num_devices:
        return (f"none: local rank {local_rank}, but the host shows {num_devices} CUDA devices",)
    indices = range(num_devices) if local_rank is None else (local_rank,)
    return tuple(_device(index) for index in indices)


def _device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
