"""Seconds that models need for their passes in a pipeline schedule that they share."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch


class PassTimes:
    """Owns what each role's passes took on this rank: of the device on CUDA, elsewhere of the host."""

    def __init__(self, device: torch.device) -> None:
        """Take the rank's device; nothing has been passed yet."""
        self._is_cuda = device.type == "cuda"
        self._passes: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextlib.contextmanager
    def passing(self, role: str) -> Iterator[None]:
        """Run a block as a pass, or a part of one, of a role."""
        begin = self._now()
        yield
        self._passes.append((role, begin, self._now()))

    def shared(self, seconds: float) -> Mapping[str, float]:
        """Return `seconds`, which all roles took together, in parts that are as their passes' times.

        Waiting for other stages is shared likewise. Forgets the passes; waits on CUDA for the device.
        """
        if self._is_cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for role, begin, end in self._passes:
            took = begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin
            sums[role] = sums.get(role, 0.0) + took
        self._passes.clear()
        total = sum(sums.values())
        return {role: seconds * own / total for role, own in sums.items()}

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
