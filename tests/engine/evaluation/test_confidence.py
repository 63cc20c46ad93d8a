"""Means with intervals, against figures worked by hand."""

import random

import pytest

from glm_rlhf.engine.evaluation.confidence import mean_estimate, share_estimate


def test_wilson_of_eight_right_in_ten():
    estimate = share_estimate([1.0] * 8 + [0.0] * 2)
    # (0.8 + 3.8415/20) / 1.38415 = 0.71672; half: 1.96/1.38415 · √(0.016 + 3.8415/400) = 0.22656
    assert (estimate.mean, estimate.num_units) == (0.8, 10)
    assert estimate.low == pytest.approx(0.49016, abs=1e-4)
    assert estimate.high == pytest.approx(0.94332, abs=1e-4)


def test_all_right_has_a_width_and_ends_at_one():
    estimate = share_estimate([1.0] * 100)
    assert estimate.high == 1.0
    assert estimate.low == pytest.approx(1 / (1 + 3.8415 / 100), abs=1e-4)


def test_a_mean_has_its_standard_error_around_it():
    estimate = mean_estimate([1.0, 2.0, 3.0, 4.0])
    # stdev √(5/3) = 1.29099, standard error 0.64550
    assert estimate.mean == 2.5
    assert estimate.high - estimate.mean == pytest.approx(1.959964 * 0.645497, abs=1e-5)
    assert estimate.mean - estimate.low == pytest.approx(estimate.high - estimate.mean)


@pytest.mark.parametrize("of_values", [share_estimate, mean_estimate])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(of_values):
    generator = random.Random(0)
    held = 0
    for _ in range(1000):
        estimate = of_values([float(generator.random() < 0.3) for _ in range(60)])
        held += estimate.low <= 0.3 <= estimate.high
    # 95 % of 1000 draws with a standard deviation of 0.7 %; a lattice of 60 moves it by about 2 %.
    assert 0.92 < held / 1000 < 0.98


def test_what_cannot_have_an_interval_is_refused():
    with pytest.raises(ValueError, match="0 values are given"):
        share_estimate([])
    with pytest.raises(ValueError, match=r"each in \[0, 1\]"):
        share_estimate([0.5, 1.5])
    with pytest.raises(ValueError, match="at least 2"):
        mean_estimate([1.0])
