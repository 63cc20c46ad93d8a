"""Seconds of work that is cut in laps."""

import time


class Timer:
    """Owns the seconds of named laps, one behind the other; laps of one name add up."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.splits: dict[str, float] = {}

    def split(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.monotonic()
        self.splits[name] = self.splits.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Seconds of all laps."""
        return sum(self.splits.values())
