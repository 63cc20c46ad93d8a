"""Peak of the memory that some work allocates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes of tensors that `work` holds at once beyond what was held before.

    On CUDA as its caching allocator counts them, on the CPU by every allocation and release of torch's
    allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return held_and_peak_bytes(work)[1]


def held_and_peak_bytes(work: Callable[[], Any]) -> tuple[int, int]:
    """Return the bytes of CPU tensors that `work` allocates and leaves behind, and the most at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return held, peak


class LiveGradients:
    """Counts the most bytes alive at once of all gradients that a model's parameters are given."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Watch the parameters, before anything else waits for their gradients."""
        self.model, self.peak = model, 0
        self._storages: list[tuple[StorageWeakRef, int]] = []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: torch.Tensor) -> None:
        storage = parameter.grad.untyped_storage()
        self._storages.append((StorageWeakRef(storage), storage.nbytes()))
        self._storages = [(ref, size) for ref, size in self._storages if not ref.expired()]
        self.peak = max(self.peak, sum({ref.cdata: size for ref, size in self._storages}.values()))


def resident_bytes(*, peak: bool = False) -> int:
    """Return this process's resident memory (Linux), or its peak since `forget_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Begin to count the peak of resident memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
