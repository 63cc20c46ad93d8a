"""Statistics of the scores of preference pairs, as sums that add up over batches and ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

NUM_BINS = 10
"""Bins of the calibration table, of equal width in confidence from 1/2 to 1."""

_MOMENTS = (
    "num_pairs",
    "num_right",
    "margin",
    "score",
    "score_squared",
    "length",
    "length_squared",
    "score_length",
    "num_shorter",
    "num_shorter_right",
)
_BINS = ("bin_pairs", "bin_confidence", "bin_right")

PAIR_SUMS = (*_MOMENTS, *(f"{name}_{index}" for name in _BINS for index in range(NUM_BINS)))
"""Names of the sums that `pair_sums` returns, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Pairs of similar confidence."""

    start: float
    """Lowest confidence."""
    end: float
    """Highest confidence."""
    num_pairs: int
    """Number of pairs in the bin."""
    mean_confidence: float | None
    """Mean of max(p, 1 − p) with p = σ(difference of scores); None without pairs."""
    accuracy: float | None
    """Share of pairs whose preferred answer has the higher score; None without pairs."""


def pair_sums(
    chosen_scores_B: torch.Tensor,
    rejected_scores_B: torch.Tensor,
    chosen_lengths_B: torch.Tensor,
    rejected_lengths_B: torch.Tensor,
) -> torch.Tensor:
    """Return fp64 [K], the sums named by `PAIR_SUMS` over B pairs; zeros for B = 0.

    A pair is right if the preferred answer has the higher score; equal scores count half. Sums of scores and
    lengths are over both answers. A pair's confidence is σ(|w − l|), from 1/2 to 1.

    Args:
        chosen_scores_B, rejected_scores_B: [B] float, w and l.
        chosen_lengths_B, rejected_lengths_B: [B], tokens of the answers.
    """
    chosen_B, rejected_B = chosen_scores_B.detach().double(), rejected_scores_B.detach().double()
    margin_B = chosen_B - rejected_B
    is_right_B = ((margin_B > 0).double() + (margin_B >= 0).double()) / 2
    is_shorter_B = (chosen_lengths_B < rejected_lengths_B).double()
    scores = torch.cat((chosen_B, rejected_B))
    lengths = torch.cat((chosen_lengths_B, rejected_lengths_B)).double()
    moments = (
        torch.ones_like(margin_B),
        is_right_B,
        margin_B,
        scores,
        scores.square(),
        lengths,
        lengths.square(),
        scores * lengths,
        is_shorter_B,
        is_shorter_B * is_right_B,
    )
    confidence_B = margin_B.abs().sigmoid()
    bin_B = ((confidence_B - 0.5) * 2 * NUM_BINS).nan_to_num(0.0).long().clamp(0, NUM_BINS - 1)
    is_in_BK = torch.nn.functional.one_hot(bin_B, NUM_BINS).double()
    bins = torch.stack((torch.ones_like(margin_B), confidence_B, is_right_B)) @ is_in_BK
    return torch.cat((torch.stack([moment.sum() for moment in moments]), bins.flatten()))


def pair_metrics(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Return accuracy, margin, spread of scores and their correlation with length; None where undefined.

    - `num_pairs`: number of pairs.
    - `accuracy`: share of right pairs; `accuracy_shorter`: among pairs whose preferred answer is the shorter.
    - `margin`: mean of w − l. `score_mean`, `score_std`: over both answers.
    - `corr_score_length`: Pearson's correlation of an answer's score with its length in tokens.
    - `calibration_error`: mean over pairs of |accuracy − confidence| of their bin.
    """
    pairs, answers = sums["num_pairs"], 2 * sums["num_pairs"]
    if not pairs:
        return {**dict.fromkeys(METRICS), "num_pairs": 0.0}
    mean, mean_length = sums["score"] / answers, sums["length"] / answers
    variance = _variance(sums["score_squared"] / answers, mean)
    length_variance = _variance(sums["length_squared"] / answers, mean_length)
    covariance = sums["score_length"] / answers - mean * mean_length
    spread = math.sqrt(variance * length_variance)
    error = sum(
        abs(sums[f"bin_right_{index}"] - sums[f"bin_confidence_{index}"]) for index in range(NUM_BINS)
    )
    return {
        "num_pairs": pairs,
        "accuracy": sums["num_right"] / pairs,
        "accuracy_shorter": sums["num_shorter_right"] / sums["num_shorter"] if sums["num_shorter"] else None,
        "margin": sums["margin"] / pairs,
        "score_mean": mean,
        "score_std": math.sqrt(variance),
        "corr_score_length": covariance / spread if spread else None,
        "calibration_error": error / pairs,
    }


METRICS = (
    "num_pairs",
    "accuracy",
    "accuracy_shorter",
    "margin",
    "score_mean",
    "score_std",
    "corr_score_length",
    "calibration_error",
)
"""Names of what `pair_metrics` returns, in order."""


def calibration_table(sums: Mapping[str, float]) -> list[CalibrationBin]:
    """Return the accuracy of the scores by bins of confidence."""
    table = []
    for index in range(NUM_BINS):
        num_pairs = sums[f"bin_pairs_{index}"]
        confidence, right = sums[f"bin_confidence_{index}"], sums[f"bin_right_{index}"]
        table.append(
            CalibrationBin(
                start=0.5 + index / (2 * NUM_BINS),
                end=0.5 + (index + 1) / (2 * NUM_BINS),
                num_pairs=round(num_pairs),
                mean_confidence=confidence / num_pairs if num_pairs else None,
                accuracy=right / num_pairs if num_pairs else None,
            )
        )
    return table


def _variance(mean_square: float, mean: float) -> float:
    """Return the variance; 0 where it is within rounding error."""
    variance = mean_square - mean * mean
    return variance if variance > 1e-12 * mean_square else 0.0
