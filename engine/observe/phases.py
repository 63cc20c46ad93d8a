"""Seconds of the phases of an iteration, which are spans of the trace too."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from glm_rlhf.parallel.runtime.spans import span


class Phases:
    """Owns the seconds of each phase; one that comes several times adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By metric, `timing_s/<phase>`: of the host, and so on CUDA up to the work that is still queued."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a block as a phase."""
        start = time.perf_counter()
        with span(name):
            yield
        self._add(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def shared(self, name: str, part: Callable[[float], Mapping[str, float]]) -> Iterator[None]:
        """Run a block as one span of several phases; `part` says of its seconds whose they are."""
        start = time.perf_counter()
        with span(name):
            yield
        for own, seconds in part(time.perf_counter() - start).items():
            self._add(own, seconds)

    def _add(self, name: str, seconds: float) -> None:
        metric = f"timing_s/{name}"
        self.seconds[metric] = self.seconds.get(metric, 0.0) + seconds
