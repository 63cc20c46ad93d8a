"""Seconds between named splits of some work."""

import time


class Timer:
    """Owns the seconds of consecutive, named splits; splits of one name add up."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.splits: dict[str, float] = {}

    def split(self, name: str) -> None:
        """Add the seconds since the last split to `name`."""
        now = time.monotonic()
        self.splits[name] = self.splits.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Seconds of all splits."""
        return sum(self.splits.values())
