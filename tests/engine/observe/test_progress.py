"""The progress of PPO: the content of an iteration's line, and the rank that writes it."""

import io
import sys

from glm_rlhf.engine.observe.progress import ProgressLine

METRICS = {
    "reward/minus_baseline/mean": 0.5,
    "objective/kl": 0.25,
    "response_length/mean": 12.0,
    "perf/tokens_per_s": 1234.4,
    "timing_s/iteration": 2.0,
}


def test_without_a_terminal_each_iteration_is_a_line_with_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with ProgressLine(steps=6, is_shown=True, first_step=2) as progress:
        now[0] += 30.0
        progress.show(3, METRICS)
    assert capsys.readouterr().err == (
        "iteration 3 of 6: reward 0.5000, KL 0.2500, length 12.0, 1234 tokens/s, 2.0 s, 01:30 left\n"
    )


def test_a_terminal_has_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressLine(steps=4, is_shown=True) as progress:
        progress.show(1, METRICS)
        progress.show(2, METRICS)
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert "2/4" in last
    assert "reward 0.500, KL 0.250, 1234 tokens/s" in last
    assert "\n" not in terminal.getvalue().rstrip("\n")


def test_other_ranks_are_silent(capsys):
    with ProgressLine(steps=4, is_shown=False) as progress:
        progress.show(1, METRICS)
    assert capsys.readouterr().err == ""
