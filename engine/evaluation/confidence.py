"""Means with 95 % confidence intervals, over independent units such as prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

_Z = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceInterval:
    """A mean with its 95 % confidence interval."""

    mean: float
    """Mean over units."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    num_units: int
    """Number of units."""


def share_estimate(values: Sequence[float]) -> ConfidenceInterval:
    """Return the mean of values in [0, 1], one per unit, with Wilson's interval.

    The interval stays inside [0, 1] and has a width also where all values are 0 or all are 1. For values in
    between, such as the share of a prompt's samples that pass, it is conservative, because the variance of a
    variable in [0, 1] with mean p is at most p (1 - p).

    Raises:
        ValueError: no values, or one outside [0, 1].

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{len(values)} values are given; at least one is required, each in [0, 1]")
    num, mean = len(values), fmean(values)
    centre = (mean + _Z**2 / (2 * num)) / (1 + _Z**2 / num)
    half = _Z / (1 + _Z**2 / num) * math.sqrt(mean * (1 - mean) / num + _Z**2 / (4 * num**2))
    return ConfidenceInterval(
        mean=mean, low=max(centre - half, 0.0), high=min(centre + half, 1.0), num_units=num
    )


def mean_estimate(values: Sequence[float]) -> ConfidenceInterval:
    """Return the mean of any values, one per unit, ± 1.96 standard errors; for tens of units or more.

    Raises:
        ValueError: fewer than two values, or one that is NaN or Inf.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"{len(values)} values are given, an interval needs at least 2, each of them finite")
    mean, half = fmean(values), _Z * stdev(values) / math.sqrt(len(values))
    return ConfidenceInterval(mean=mean, low=mean - half, high=mean + half, num_units=len(values))
