"""Seconds of the phases of an iteration; each phase is a span of the trace too."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from glm_rlhf.parallel.runtime.spans import span


class Phases:
    """Owns the seconds of each phase; repetitions of a phase add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By metric, `timing_s/<phase>`: host time, which on CUDA does not include work still queued."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a block as a phase."""
        start = time.perf_counter()
        with span(name):
            yield
        self._add(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def shared(self, name: str, split: Callable[[float], Mapping[str, float]]) -> Iterator[None]:
        """Run a block as one span of several phases; `split` divides its seconds into seconds by phase."""
        start = time.perf_counter()
        with span(name):
            yield
        for phase, seconds in split(time.perf_counter() - start).items():
            self._add(phase, seconds)

    def _add(self, name: str, seconds: float) -> None:
        metric = f"timing_s/{name}"
        self.seconds[metric] = self.seconds.get(metric, 0.0) + seconds
