"""Time per model in a pipeline schedule that several models share."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch


class PassTimes:
    """Owns the times of each role's passes on this rank: device time on CUDA, host time elsewhere."""

    def __init__(self, device: torch.device) -> None:
        """Start without passes, on the rank's device."""
        self._is_cuda = device.type == "cuda"
        self._passes: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextlib.contextmanager
    def passing(self, role: str) -> Iterator[None]:
        """Time a block as a pass, or a part of one, of a role."""
        begin = self._now()
        yield
        self._passes.append((role, begin, self._now()))

    def shared(self, seconds: float) -> Mapping[str, float]:
        """Return the total `seconds` of all roles, divided in proportion to their passes' times.

        Time spent waiting for other stages is divided in the same proportion. Clears the passes; on CUDA it
        synchronises the device.
        """
        if self._is_cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for role, begin, end in self._passes:
            pass_s = begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin
            sums[role] = sums.get(role, 0.0) + pass_s
        self._passes.clear()
        total = sum(sums.values())
        return {role: seconds * role_s / total for role, role_s in sums.items()}

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
