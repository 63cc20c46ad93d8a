"""The machine, the versions and the rates that bound every figure, as a report has them."""

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from glm_rlhf.engine.bench.harness import Contender, interleaved

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where the sources are run from one."""
PACKAGES = ("torch", "triton", "megatron-core", "transformers", "safetensors")
PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "flashinfer-python")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """The peak rates of a device; a row's limit is the larger of bytes ÷ copy and FLOP ÷ product."""

    bytes_per_s: float
    """Copy of a large tensor, bytes read plus bytes written."""
    flop_per_s: float
    """Square matrix product of random numbers: bf16 on CUDA, fp32 on the CPU."""
    source: str
    """Where the two numbers come from."""

    def limit_s(self, num_bytes: float, num_flop: float) -> float:
        """Return the least time in which so much can be moved and computed."""
        return max(num_bytes / self.bytes_per_s, num_flop / self.flop_per_s)


# The reference chip of every full-shape limit: measured once with random data, not in this run.
H200 = MachineRates(bytes_per_s=4.3e12, flop_per_s=790e12, source="H200: 790 TFLOP/s, 4.3 TB/s")


def measured_rates(device: torch.device) -> MachineRates:
    """Return this device's rates, measured now with the threads that torch has."""
    num_elements, size, dtype = 2**26, 1024, torch.float32
    if device.type == "cuda":
        num_elements, size, dtype = 2**30, 8192, torch.bfloat16
    rates = interleaved(
        [_copy(num_elements, device), _product(size, dtype, device)], device=device, budget_s=2.0
    )
    bytes_per_s = 2 * 4 * num_elements / rates["copy"].median_s
    flop_per_s = 2 * size**3 / rates["product"].median_s
    source_text = (
        f"measured in this run: {flop_per_s / 1e12:.3g} TFLOP/s ({str(dtype).removeprefix('torch.')} "
        f"product of {size}³), {bytes_per_s / 1e9:.4g} GB/s (copy, read + write)"
    )
    return MachineRates(bytes_per_s=bytes_per_s, flop_per_s=flop_per_s, source=source_text)


def _copy(num_elements: int, device: torch.device) -> Contender:
    source = torch.rand(num_elements, device=device)
    target = torch.empty_like(source)
    return Contender(name="copy", run=lambda: target.copy_(source))


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Contender:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Contender(name="product", run=lambda: left @ right)


def description(device: torch.device, *, has_cuda_columns: bool = True) -> dict[str, str]:
    """Return hardware, versions, commit and date, each under the name that a report prints.

    Where a report `has_cuda_columns`, it says of a CPU why they are empty.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: version_of(name) or "not installed" for name in (*PACKAGES, *PEERS)}
    facts = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
        "device": _device_name(device),
        "processor": f"{_processor_name()}, {os.cpu_count()} cores",
    }
    if device.type != "cuda" and has_cuda_columns:
        facts["CUDA"] = "no CUDA device was at hand: every CUDA column is empty"
    return facts | {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def version_of(package: str) -> str | None:
    """Return the installed version of a distribution, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit that is checked out, and whether the files differ from it."""
    if not (ROOT / "setup.py").is_file():
        return f"unknown (installed, {version_of('glm-rlhf')})"  # a checkout around it is another project's
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return f"{head} with uncommitted changes" if changes else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"{properties.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
    )


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
