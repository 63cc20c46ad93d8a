"""The learning rate: warm-up, cosine, and the ends of both."""

import math
from itertools import pairwise

import pytest

from glm_rlhf.engine.training.lr_schedule import cosine_lr


def rates(**settings) -> list[float]:
    return [cosine_lr(step, **settings) for step in range(settings["steps"])]


def test_hand_worked():
    # Two steps of warm-up; then the cosine at 0, 1/3 and 2/3 of its half period.
    found = rates(steps=5, lr=1.0, min_lr=0.2, warmup_steps=2)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.4])


def test_it_falls_all_the_way_after_the_warm_up():
    found = rates(steps=50, lr=3e-4, min_lr=0.0, warmup_steps=5)
    assert found[:5] == pytest.approx([3e-4 * share / 5 for share in range(1, 6)])
    assert all(later < earlier for earlier, later in pairwise(found[5:]))
    assert 0 < found[-1] < 3e-4 * 0.002  # (π / 45)² / 4 of the full rate


def test_min_lr_equal_to_lr_is_constant():
    assert rates(steps=7, lr=0.1, min_lr=0.1, warmup_steps=0) == pytest.approx([0.1] * 7)


@pytest.mark.parametrize("steps, warmup_steps", [(1, 0), (1, 1), (2, 1), (3, 3), (2, 5)])
def test_short_runs_have_finite_rates(steps, warmup_steps):
    found = rates(steps=steps, lr=1.0, min_lr=0.0, warmup_steps=warmup_steps)
    assert all(math.isfinite(rate) and 0 < rate <= 1 for rate in found)
