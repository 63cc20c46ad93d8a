"""Sums of pairs: computed by hand, additive, and None where undefined."""

import math

import pytest
import torch

from glm_rlhf.engine.objectives.pair_statistics import (
    METRICS,
    PAIR_SUMS,
    calibration_table,
    pair_metrics,
    pair_sums,
)


def named(*pairs: tuple[float, float, int, int]) -> dict[str, float]:
    chosen, rejected, chosen_lengths, rejected_lengths = torch.tensor(pairs).reshape(-1, 4).unbind(1)
    sums = pair_sums(chosen, rejected, chosen_lengths.int(), rejected_lengths.int())
    return dict(zip(PAIR_SUMS, sums.tolist(), strict=True))


# (w, l, tokens of the chosen, tokens of the rejected)
PAIRS = [(1.0, 0.0, 5, 3), (0.5, 1.5, 2, 8), (2.0, 2.0, 4, 4), (3.0, -1.0, 1, 2)]


def test_hand_worked():
    metrics = pair_metrics(named(*PAIRS))
    scores, lengths = [1, 0.5, 2, 3, 0, 1.5, 2, -1], [5, 2, 4, 1, 3, 8, 4, 2]
    assert metrics["num_pairs"] == 4
    assert metrics["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)  # the tie counts half
    assert metrics["accuracy_shorter"] == pytest.approx(1 / 2)  # the second and the fourth pair
    assert metrics["margin"] == pytest.approx((1 - 1 + 0 + 4) / 4)
    assert metrics["score_mean"] == pytest.approx(sum(scores) / 8)
    assert metrics["score_std"] == pytest.approx(torch.tensor(scores).std(correction=0).item(), rel=1e-6)
    both = torch.tensor([scores, lengths])
    assert metrics["corr_score_length"] == pytest.approx(both.corrcoef()[0, 1].item(), rel=1e-5)


def test_sums_of_parts_are_those_of_the_whole():
    whole, first, second = named(*PAIRS), named(*PAIRS[:1]), named(*PAIRS[1:])
    assert whole == pytest.approx({name: first[name] + second[name] for name in PAIR_SUMS})


def test_calibration_by_confidence():
    # σ(1) = 0.731 → bin [0.70, 0.75); σ(0) = 0.5 → the first; σ(4) = 0.982 → the last.
    sums = named(*PAIRS)
    table = calibration_table(sums)
    assert [row.num_pairs for row in table] == [1, 0, 0, 0, 2, 0, 0, 0, 0, 1]
    sure = 1 / (1 + math.exp(-1))
    assert (table[4].start, table[4].end) == (0.7, 0.75)
    assert table[4].mean_confidence == pytest.approx(sure)
    assert table[4].accuracy == pytest.approx(0.5)  # one of the two is right
    assert table[0].accuracy == pytest.approx(0.5)  # a tie
    assert table[1].accuracy is None
    very_sure = 1 / (1 + math.exp(-4))
    error = (2 * abs(0.5 - sure) + 0 + abs(1 - very_sure)) / 4
    assert pair_metrics(sums)["calibration_error"] == pytest.approx(error)


def test_what_is_not_defined_is_none():
    nothing = pair_metrics(named())
    assert nothing == {**dict.fromkeys(METRICS), "num_pairs": 0.0}
    equal = pair_metrics(named((0.7, 0.7, 3, 3), (0.7, 0.7, 5, 5)))
    assert equal["corr_score_length"] is None  # the scores do not vary
    assert equal["accuracy_shorter"] is None  # no preferred answer is the shorter
    assert (equal["accuracy"], equal["score_std"]) == (0.5, 0.0)


def test_far_away_scores_keep_their_spread():
    # fp32 squares of 1000 would leave nothing of a spread of 0.01; the sums are fp64.
    metrics = pair_metrics(named((1000.02, 1000.0, 1, 2), (1000.02, 1000.0, 1, 2)))
    assert metrics["score_std"] == pytest.approx(0.01, rel=1e-2)
    assert metrics["corr_score_length"] == pytest.approx(-1.0, rel=1e-3)


def test_a_score_that_is_not_a_number_shows():
    metrics = pair_metrics(named((math.nan, 0.0, 1, 2), (1.0, 0.0, 1, 2)))
    assert math.isnan(metrics["margin"])
    assert math.isnan(metrics["score_mean"])
