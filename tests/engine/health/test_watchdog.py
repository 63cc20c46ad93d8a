"""The watchdog: silent while there is progress, else one line, the stacks, and the end."""

import re
import threading
import time

import pytest

from glm_rlhf.engine.health.watchdog import HUNG, watchdog
from glm_rlhf.parallel.runtime.spans import heartbeat, span

PATIENCE_S = 60.0
"""For what comes at once on an idle machine."""


@pytest.fixture(autouse=True)
def without_grace(monkeypatch):
    """The watchdog's own watcher would end this process where the machine holds it up for seconds."""
    monkeypatch.setattr("glm_rlhf.engine.health.watchdog._GRACE_S", 600.0)


def test_a_rank_without_progress_says_where_it_stands_and_ends(capfd):
    codes, has_ended = [], threading.Event()

    def end(code):
        codes.append(code)
        has_ended.set()

    with span("update"), span("policy"), watchdog(0.2, rank=3, end=end):
        assert has_ended.wait(PATIENCE_S)
    assert codes == [HUNG]
    text = capfd.readouterr().err
    assert re.search(r"\[rank 3\] hung for \d+ s in phase update/policy: in no collective, at ", text), text
    assert "most recent call first" in text
    assert "test_watchdog.py" in text


class Clock:
    """A clock that stands still until it is moved, and counts how often the watchdog reads it."""

    def __init__(self):
        self.now, self._reads = time.monotonic(), threading.Semaphore(0)

    def __call__(self):
        now = self.now
        if threading.current_thread().name == "watchdog":
            self._reads.release()
        return now

    def move(self, seconds):
        """Let time pass, and return when the watchdog has seen it."""
        self.now += seconds
        while self._reads.acquire(blocking=False):
            pass
        for _ in range(2):  # the first may have been under way, with the time before
            assert self._reads.acquire(timeout=PATIENCE_S)


def test_progress_of_any_kind_keeps_it_silent(capfd, monkeypatch):
    codes, clock = [], Clock()
    monkeypatch.setattr("time.monotonic", clock)
    with watchdog(0.1, rank=0, end=codes.append):
        for turn in range(8):
            clock.move(0.09)
            if turn % 2:
                heartbeat()
            else:
                with span("update"):
                    pass
    with watchdog(None, rank=0, end=codes.append):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert codes == []
    assert capfd.readouterr().err == ""


def test_a_suspension_does_not_count_and_a_later_hang_does(capfd, monkeypatch):
    codes, clock = [], Clock()
    monkeypatch.setattr("time.monotonic", clock)
    with watchdog(1.0, rank=1, end=codes.append):
        for seconds in (0.3, 3600, 0.3, 500):  # two suspensions of a job that waits for a second at most
            clock.move(seconds)
            if seconds == 0.3:
                heartbeat()
        assert codes == []
        said = capfd.readouterr().err
        assert "[rank 1] did not run for 3600 s (suspended?): this time does not count" in said
        assert said.count("suspended?") == 2
        heartbeat()
        clock.move(3600.0)
        while not codes:  # the hang that follows a suspension is found
            clock.now += 0.1
            time.sleep(0.1)
    assert codes == [HUNG]
    assert "[rank 1] hung for" in capfd.readouterr().err
