"""Claims about arms are judged seed by seed, and a claim that fails is written down as failed."""

import json
import math

import pytest

from benchmarks.learning.outcome import Claim, Outcome, Trial, judge, write_outcome


def trials(arm: str, values: list[float]) -> list[Trial]:
    return [
        Trial(arm=arm, seed=seed, figures={"x": value, "|x|": abs(value)})
        for seed, value in enumerate(values)
    ]


def claim(expects: str, margin: float = 0.0) -> Claim:
    return Claim(text="text", figure="x", arm="a", against="b", expects=expects, margin=margin)


# Seeds differ by far more than the arms: only the differences -1, -2, -3, -4, -5 tell.
PAIRED = trials("a", [99.0, 0.0, 47.0, 6.0, -5.0]) + trials("b", [100.0, 2.0, 50.0, 10.0, 0.0])


def test_hand_worked():
    verdict = judge(claim("lower"), PAIRED)
    assert verdict.mean_difference == pytest.approx(-3.0)
    # Standard deviation √2.5 over five seeds, t = 2.776.
    assert verdict.interval == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert (verdict.num_in_direction, verdict.num_seeds, verdict.is_shown) == (5, 5, True)


@pytest.mark.parametrize(
    ("expects", "margin", "is_shown"),
    [("higher", 0.0, False), ("within", 4.0, False), ("within", 5.0, True)],  # -3 ± 1.96
)
def test_the_whole_interval_has_to_agree(expects, margin, is_shown):
    assert judge(claim(expects, margin), PAIRED).is_shown is is_shown


def test_a_mean_on_the_right_side_is_not_enough():
    found = trials("a", [-1.0, -9.0, 1.0, 2.0, -1.0]) + trials("b", [0.0] * 5)
    verdict = judge(claim("lower"), found)
    assert verdict.mean_difference < 0
    assert (verdict.num_in_direction, verdict.is_shown) == (3, False)


@pytest.mark.parametrize("count", [4, 6])
def test_arms_need_the_same_seeds_and_enough_of_them(count):
    with pytest.raises(ValueError, match="from 5 to 12"):
        judge(claim("lower"), trials("a", [0.0] * count) + trials("b", [0.0] * min(count, 5)))


def test_both_files_hold_verdicts_and_every_trial(tmp_path):
    outcome = Outcome(
        title="Title",
        command="python -m x",
        notes=("note",),
        claims=(claim("lower"), claim("higher")),
        trials=PAIRED,
        elapsed_s=1.0,
    )
    verdicts = write_outcome(outcome, "x", tmp_path)
    assert [verdict.is_shown for verdict in verdicts] == [True, False]
    text = (tmp_path / "learning_x.md").read_text()
    assert "| text | x: a − b | -3 ± 2 | 5 of 5 | shown |" in text
    assert "| text | x: a − b | -3 ± 2 | 0 of 5 | NOT shown |" in text
    assert "| x | 29.4 ± 44 | 32.4 ± 43 |" in text
    assert "| \\|x\\| | 31.4 ± 42 | 32.4 ± 43 |" in text
    found = json.loads((tmp_path / "learning_x.json").read_text())
    assert [trial["figures"]["x"] for trial in found["trials"]] == [99, 0, 47, 6, -5, 100, 2, 50, 10, 0]
