"""The harness takes turns, times only what is right, and says why the rest has no figure."""

import math

import pytest
import torch

from glm_rlhf.engine.bench import harness
from glm_rlhf.engine.bench.harness import (
    Contender,
    Problem,
    Ratio,
    interleaved,
    measure,
    relative_error,
    summary,
)

CPU = torch.device("cpu")


def logging(name: str, log: list[str], **options) -> Contender:
    return Contender(name=name, run=lambda: log.append(name), **options)


def test_contenders_run_in_turns():
    log: list[str] = []
    timings = interleaved([logging("a", log), logging("b", log)], device=CPU, budget_s=0.0)
    assert log == ["a", "b"] * (len(log) // 2)
    # two rounds of warm-up, then the fewest repetitions that a budget of nothing allows
    assert [timing.repetitions for timing in timings.values()] == [5, 5]
    assert len(log) == 2 * (2 + 5)


def test_preparation_is_done_before_every_run_and_not_timed():
    log: list[str] = []
    prepared = logging("run", log, prepare=lambda: log.append("prepare"))
    interleaved([prepared], device=CPU, budget_s=0.0)
    assert log == ["prepare", "run"] * (len(log) // 2)


def test_each_time_goes_to_its_contender():
    matrix = torch.randn(512, 512)
    slow = Contender(name="slow", run=lambda: [matrix @ matrix for _ in range(10)])
    fast = Contender(name="fast", run=lambda: None)
    timings = interleaved([slow, fast], device=CPU, budget_s=0.0)
    assert timings["slow"].median_s > 10 * timings["fast"].median_s  # some ms against less than a µs


def test_wrong_failing_and_absent_contenders_are_reported_and_not_timed():
    right = [torch.arange(1.0, 5.0)]

    def fail():
        raise ValueError("shapes do not fit\nsecond line")

    entries = measure(
        Problem(
            contenders=[
                Contender(name="right", run=lambda: right),
                Contender(name="wrong", run=lambda: [right[0] * 1.1]),
                Contender(name="not finite", run=lambda: [right[0] / 0.0]),
                Contender(name="failing", run=fail),
                Contender(name="missing", run=fail, absent="not installed"),
            ],
            expected=lambda: right,
            tolerance=1e-3,
        ),
        device=CPU,
        budget_s=0.0,
    )
    assert [entry.timing is not None for entry in entries] == [True, False, False, False, False]
    statuses = {entry.name: entry.status for entry in entries}
    assert statuses["right"] == ""
    assert statuses["wrong"].startswith("wrong: error 1.0e-01")
    assert statuses["not finite"].startswith("wrong: error inf")
    assert statuses["failing"] == "failed: shapes do not fit"
    assert statuses["missing"] == "absent: not installed"


def test_an_answer_is_read_untimed_from_what_a_run_leaves():
    state = torch.zeros(3)
    contender = Contender(name="in place", run=lambda: state.add_(1.0), answer=lambda _: [state.clone()])
    (entry,) = measure(
        Problem(contenders=[contender], expected=lambda: [torch.ones(3)], tolerance=0.0),
        device=CPU,
        budget_s=0.0,
    )
    assert entry.status == ""
    assert entry.error == 0.0


def test_memory_is_the_peak_of_a_run_less_what_it_must_allocate():
    contender = Contender(name="sum", run=lambda: [torch.ones(250_000) + 1.0])
    (entry,) = measure(
        Problem(
            contenders=[contender],
            expected=lambda: [torch.full((250_000,), 2.0)],
            tolerance=0.0,
            besides_bytes=1_000_000,
        ),
        device=CPU,
        budget_s=0.0,
        counts_memory=True,
    )
    # Ones and their sum live at once, 1 MB each; the sum is what was asked for. Scalars add some bytes.
    assert entry.figures["extra MB"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("answer", "expected", "error"),
    [
        ([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.0])], 0.0),
        ([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])], 0.1),  # 0.5 of a norm of 5
        ([torch.tensor([1.0]), None], [torch.tensor([1.0]), torch.tensor([7.0])], 0.0),
        ([None], [torch.tensor([1.0])], math.inf),
        ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0])], math.inf),
    ],
)
def test_the_error_is_relative_to_the_expected_norm(answer, expected, error):
    assert relative_error(answer, expected) == pytest.approx(error)


def test_the_summary_is_the_median_and_the_quartiles():
    timing = summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.low_s, timing.median_s, timing.high_s) == (2.0, 3.0, 4.0)
    assert timing.repetitions == 5


def test_ratios_are_taken_turn_by_turn(monkeypatch):
    """A machine of half the speed from the third turn on moves times, and no quotient."""
    seconds = [1.0, 2.0, 1.0, 2.0, 2.0, 4.0, 2.0, 4.0, 2.0, 4.4]
    taken = iter([[]] * harness.WARM_UP_RUNS + [seconds])
    monkeypatch.setattr(harness._HostClock, "seconds", lambda _self: next(taken))
    contenders = [Contender(name=name, run=lambda: None) for name in ("ours", "theirs")]
    timings = interleaved(contenders, device=CPU, budget_s=0.0)
    assert timings["ours"].ratio is None
    assert timings["theirs"].ratio == Ratio(median=2.0, low=2.0, high=2.0)
    assert (timings["theirs"].low_s, timings["theirs"].high_s) == (2.0, 4.0)


def test_there_is_no_ratio_to_an_answer_that_is_wrong():
    def ones():
        return [torch.ones(3)]

    wrong = Contender(name="ours", run=lambda: [torch.zeros(3)])
    problem = Problem(
        contenders=[wrong, Contender(name="a", run=ones), Contender(name="b", run=ones)],
        expected=ones,
        tolerance=1e-6,
    )
    found = {entry.name: entry for entry in measure(problem, device=CPU, budget_s=0.0)}
    assert found["ours"].timing is None
    assert found["b"].timing.ratio is None
