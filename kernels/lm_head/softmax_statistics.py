"""Mergeable softmax statistics of a row: slices of a vocabulary to logprob, entropy and log-sum-exp."""

from typing import NamedTuple

import torch

LOWEST_EXPONENT = -1.0e4
"""Its exponential is 0 in float32 and float64; 0 times it is 0, whereas 0 times -inf is NaN."""
_TEMPERATURES = (1e-6, 1e6)


def check_temperature(operation: str, temperature: float) -> None:
    """Raise ValueError unless `logits / temperature` has its differences in fp32, and their gradients."""
    low, high = _TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(
            f"{operation}: temperature {temperature} given, a number from {low} to {high} required"
        )


class SoftmaxStatistics(NamedTuple):
    """Contribution of one vocabulary slice to the softmax of each row, with `z` = logits / temperature.

    A slice without columns, or with -inf only, has (-inf, 0, 0, 0), the neutral element of `merged`.
    """

    max_T: torch.Tensor
    """`[T]`, max over the slice of z."""
    sum_exp_T: torch.Tensor
    """`[T]`, sum over the slice of exp(z - max)."""
    weighted_sum_T: torch.Tensor
    """`[T]`, sum over the slice of exp(z - max) * (z - max), for the entropy."""
    target_logit_T: torch.Tensor
    """`[T]`, z of the row's target, 0 if it is outside the slice."""

    @classmethod
    def empty(cls, num_rows: int, like: torch.Tensor) -> "SoftmaxStatistics":
        """Return the statistics of no columns, with the dtype and device of `like`."""
        zeros = [like.new_zeros(num_rows) for _ in range(3)]
        return cls(like.new_full((num_rows,), -torch.inf), *zeros)

    def rescaled(self, max_T: torch.Tensor) -> "SoftmaxStatistics":
        """Return the same sums relative to another maximum `>= self.max_T`, so that they can be added."""
        anchor_T = finite_anchor(max_T)
        shift_T = (self.max_T - anchor_T).clamp_(min=LOWEST_EXPONENT)
        scale_T = shift_T.exp()
        weighted_T = (self.weighted_sum_T + shift_T * self.sum_exp_T).mul_(scale_T)
        return SoftmaxStatistics(max_T, self.sum_exp_T * scale_T, weighted_T, self.target_logit_T)

    def merged(self, other: "SoftmaxStatistics") -> "SoftmaxStatistics":
        """Return the statistics of the union of both slices."""
        max_T = torch.maximum(self.max_T, other.max_T)
        left, right = self.rescaled(max_T), other.rescaled(max_T)
        sums = [a + b for a, b in zip(left[1:], right[1:], strict=True)]
        return SoftmaxStatistics(max_T, *sums)

    def logprob(self) -> tuple[torch.Tensor, "RowDistribution"]:
        """Return `(logprob_T, distribution)` of statistics that cover the whole vocabulary.

        logprob = z_target - max - log(sum_exp), entropy = log(sum_exp) - weighted_sum / sum_exp.
        A row without a finite logit has no distribution: all its results are NaN, as in `log_softmax`.
        """
        log_sum_T = self.sum_exp_T.log()
        # A small difference of larger terms if one token has all the mass: rounding must not make it < 0.
        entropy_T = (log_sum_T - self.weighted_sum_T / self.sum_exp_T).clamp_(min=0)
        return (self.target_logit_T - self.max_T) - log_sum_T, RowDistribution(
            self.max_T, log_sum_T, entropy_T
        )


class RowDistribution(NamedTuple):
    """Each row's softmax for backward: log p_j = (z_j - max) - log_sum.

    Maximum and logarithm are stored separately because their sum rounds to 1e-3 for logits of about 1e4.
    """

    max_T: torch.Tensor
    """`[T]`, max over the vocabulary of z = logits / temperature."""
    log_sum_T: torch.Tensor
    """`[T]`, log of the sum of exp(z - max)."""
    entropy_T: torch.Tensor
    """`[T]`, -sum p log p in nats."""

    def taken(self, rows: torch.Tensor | slice | None) -> "RowDistribution":
        """Return the distributions of some rows; None means every row."""
        return self if rows is None else RowDistribution(*(part_T[rows] for part_T in self))


def finite_anchor(max_T: torch.Tensor) -> torch.Tensor:
    """Return `max_T` with -inf replaced by 0, so that (-inf) - (-inf) never appears."""
    return torch.where(max_T == -torch.inf, 0, max_T)
