"""Means with 95 % confidence intervals, over independent units such as prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

_Z = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceInterval:
    """A mean and where it lies with 95 % confidence."""

    mean: float
    """Of the units."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    num_units: int
    """How many there were."""


def share_estimate(values: Sequence[float]) -> ConfidenceInterval:
    """Return the mean of values in [0, 1], one a unit, with Wilson's interval.

    It stays inside [0, 1] and has a width where all values are 0 or all are 1. For values between, such as
    the share of a prompt's samples that are right, it is too wide rather than too narrow, for no variable
    in [0, 1] of mean p varies more than p (1 - p).

    Raises:
        ValueError: no values, or one outside [0, 1].

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{len(values)} values are given, required is at least one, each in [0, 1]")
    num, mean = len(values), fmean(values)
    centre = (mean + _Z**2 / (2 * num)) / (1 + _Z**2 / num)
    half = _Z / (1 + _Z**2 / num) * math.sqrt(mean * (1 - mean) / num + _Z**2 / (4 * num**2))
    return ConfidenceInterval(
        mean=mean, low=max(centre - half, 0.0), high=min(centre + half, 1.0), num_units=num
    )


def mean_estimate(values: Sequence[float]) -> ConfidenceInterval:
    """Return the mean of any values, one a unit, ± 1.96 standard errors; for tens of units and more.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values are given, an interval needs at least 2")
    mean, half = fmean(values), _Z * stdev(values) / math.sqrt(len(values))
    return ConfidenceInterval(mean=mean, low=mean - half, high=mean + half, num_units=len(values))
