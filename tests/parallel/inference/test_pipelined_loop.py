"""The order in which groups run, and how a run ends."""

from types import SimpleNamespace

import pytest

from glm_rlhf.parallel.inference.pipelined_loop import TickCount, run_queue


class Log:
    """A stage and a queue in one, which record their calls."""

    def __init__(self, *, num_groups, pp=1, num_chunks=1, steps=2, fails=None):
        self.topology = SimpleNamespace(layout=SimpleNamespace(pp=pp))
        self.num_chunks, self.calls = num_chunks, []
        self._left = [steps] * num_groups
        self._taken = 0
        self._total = steps * num_groups
        self._fails = fails

    @property
    def is_finished(self):
        return self._taken == self._total

    def next(self, group):
        self.calls.append(f"next {group}")
        if self._left[group] == 0:
            return None
        self._left[group] -= 1
        return f"{group}.{self._left[group]}"

    def start(self, plan):
        return plan

    def advance(self, turn, chunk):
        self.calls.append(f"chunk {chunk} of {turn}")

    def sampled(self, turn):
        self.calls.append(f"drawn {turn}")
        if turn == self._fails:
            raise FloatingPointError(turn)
        return [turn], [0.0], [0.0]

    def take(self, group, tokens, _logprobs, _plain):
        self._taken += 1
        return tokens

    def finish(self):
        self.calls.append("finish")


def test_groups_rotate_and_chunks_follow_each_other():
    log, ticks = Log(num_groups=2, pp=2, num_chunks=2, steps=2), TickCount()
    assert list(run_queue(log, log, num_groups=2, ticks=ticks)) == ["0.1", "1.1", "0.0", "1.0"]
    assert log.calls == [
        *("next 0", "chunk 0 of 0.1", "next 1", "chunk 0 of 1.1", "chunk 1 of 0.1", "chunk 1 of 1.1"),
        *("drawn 0.1", "next 0", "chunk 0 of 0.0", "drawn 1.1", "next 1", "chunk 0 of 1.0"),
        *("chunk 1 of 0.0", "chunk 1 of 1.0"),
        *("drawn 0.0", "next 0", "drawn 1.0", "next 1"),
        "finish",
    ]
    assert (ticks.busy, ticks.idle) == (4, 2)
    assert ticks.idle_fraction == pytest.approx(1 / 3)


def test_idle_steps_are_used_before_the_next_round():
    log = Log(num_groups=2, pp=2, steps=2)
    log._left, log._total = [3, 1], 4
    list(run_queue(log, log, num_groups=2, when_idle=lambda: log.calls.append("idle turn")))
    assert log.calls == [
        *("next 0", "chunk 0 of 0.2", "next 1", "chunk 0 of 1.0"),
        *("drawn 0.2", "next 0", "chunk 0 of 0.1", "drawn 1.0", "next 1"),
        *("idle turn", "drawn 0.1", "next 0", "chunk 0 of 0.0", "next 1"),
        *("idle turn", "drawn 0.0", "next 0", "next 1"),
        "finish",
    ]


def test_a_failure_completes_all_steps():
    log = Log(num_groups=3, pp=2, num_chunks=2, steps=5, fails="1.3")
    with pytest.raises(FloatingPointError, match=r"1\.3"):
        list(run_queue(log, log, num_groups=3))
    # In the third round group 0 has begun a step, group 1 fails, group 2 has its step of the second round.
    assert log.calls[-4:] == ["chunk 1 of 0.2", "drawn 2.3", "drawn 0.2", "finish"]


def test_fewer_groups_than_stages_are_refused():
    log = Log(num_groups=2, pp=3)
    with pytest.raises(ValueError, match="2 groups for 3 stages"):
        list(run_queue(log, log, num_groups=2))
    assert log.calls == []


def test_ticks_before_the_first_are_no_fraction():
    assert TickCount().idle_fraction == 0.0
