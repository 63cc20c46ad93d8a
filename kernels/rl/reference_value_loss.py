"""PPO's clipped value loss with its statistics in plain torch."""

from dataclasses import dataclass

import torch

VALUE_SUMS = (
    "objective",
    "num_tokens",
    "num_clipped",
    "value",
    "return",
    "square_of_return",
    "error",
    "square_of_error",
    "num_nonfinite",
)
"""The entries of `ValueStatistics.sums`, summed over the trained tokens; error = return - value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueStatistics:
    """Statistics of a critic update, as one vector that is summed over micro-batches and ranks.

    All-reduce `sums` by SUM, or add two objects; the properties are then those of the whole. A mean without
    tokens is 0; a NaN among the inputs appears in the sums and in `num_nonfinite`.
    """

    sums: torch.Tensor
    """[9] fp32, in the order of `VALUE_SUMS`."""

    @property
    def maxima(self) -> None:
        """None: all of its statistics are sums."""
        return None

    def __add__(self, other: "ValueStatistics") -> "ValueStatistics":
        return ValueStatistics(sums=self.sums + other.sums)

    def total(self, name: str) -> torch.Tensor:
        """Return the sum called `name` in `VALUE_SUMS`, 0-dim."""
        return self.sums[VALUE_SUMS.index(name)]

    def mean(self, name: str) -> torch.Tensor:
        """Return the sum called `name` divided by the number of trained tokens, 0-dim."""
        return self.total(name) / self.num_tokens.clamp(min=1)

    @property
    def num_tokens(self) -> torch.Tensor:
        """Trained tokens."""
        return self.total("num_tokens")

    @property
    def value_loss(self) -> torch.Tensor:
        """Mean loss per trained token (with the factor ½)."""
        return self.mean("objective")

    @property
    def clip_fraction(self) -> torch.Tensor:
        """Fraction of tokens whose clipped error is the larger one, so that they get no gradient."""
        return self.mean("num_clipped")

    @property
    def value_mean(self) -> torch.Tensor:
        """Mean value."""
        return self.mean("value")

    @property
    def return_mean(self) -> torch.Tensor:
        """Mean return."""
        return self.mean("return")

    @property
    def explained_variance(self) -> torch.Tensor:
        """1 - Var(return - value) / Var(return), at most 1; NaN if the returns do not vary."""
        variance_of_error = self.mean("square_of_error") - self.mean("error").square()
        variance_of_return = self.mean("square_of_return") - self.mean("return").square()
        explained = 1.0 - variance_of_error.clamp(min=0) / variance_of_return
        return torch.where(variance_of_return > 0, explained, torch.nan)

    @property
    def num_nonfinite(self) -> torch.Tensor:
        """Trained tokens whose loss or gradient is NaN or infinite: counted, not replaced."""
        return self.total("num_nonfinite")


def ppo_value_loss(
    values_T: torch.Tensor,
    old_values_T: torch.Tensor | None,
    returns_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    value_clip: float | None = None,
    denominator: float | torch.Tensor,
) -> tuple[torch.Tensor, ValueStatistics]:
    """Return (loss, statistics): the definition of `glm_rlhf.kernels.rl.value_loss.ppo_value_loss`.

    Arithmetic is fp32, or fp64 if `values_T` is fp64.
    """
    dtype = torch.float64 if values_T.dtype == torch.float64 else torch.float32

    def trained(source_T: torch.Tensor) -> torch.Tensor:
        return torch.where(mask_T, source_T.to(dtype), 0.0)

    value_T, return_T = trained(values_T), trained(returns_T.detach())
    loss_T = 0.5 * (value_T - return_T).square()
    is_clipped_T = torch.zeros_like(mask_T)
    if value_clip is not None:
        old_value_T = trained(old_values_T.detach())
        near_T = torch.minimum(torch.maximum(value_T, old_value_T - value_clip), old_value_T + value_clip)
        clipped_T = 0.5 * (near_T - return_T).square()
        # Strictly larger implies out of range, where the clipped branch is constant. NaN counts as clipped.
        is_clipped_T = mask_T & ~(clipped_T <= loss_T)
        loss_T = torch.where(is_clipped_T, clipped_T.detach(), loss_T)
    objective = loss_T.sum()

    with torch.no_grad():
        error_T = return_T - value_T
        sums = torch.stack(
            [
                source_T.detach().to(dtype).sum()
                for source_T in (
                    loss_T,
                    mask_T,
                    is_clipped_T,
                    value_T,
                    return_T,
                    return_T.square(),
                    error_T,
                    error_T.square(),
                    ~loss_T.isfinite(),
                )
            ]
        )
    return objective / denominator, ValueStatistics(sums=sums.float())
