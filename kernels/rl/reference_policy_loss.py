"""PPO's clipped policy loss with its statistics in plain torch."""

from dataclasses import dataclass

import torch

from glm_rlhf.kernels.rl.reference_kl import token_kl

POLICY_SUMS = (
    "objective",
    "num_tokens",
    "policy_loss",
    "entropy",
    "kl_reference",
    "num_clipped",
    "num_dual_clipped",
    "kl_k1",
    "kl_k3",
    "ratio",
    "num_nonfinite",
)
"""The entries of `PolicyStatistics.sums`, summed over the trained tokens, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatistics:
    """Statistics of a policy update, as two vectors that are reduced over micro-batches and ranks.

    All-reduce `sums` by SUM and `maxima` by MAX, or add two objects; the properties are then those of the
    whole. A mean without tokens is 0; a NaN among the inputs appears in the sums and in `num_nonfinite`.
    """

    sums: torch.Tensor
    """[11] fp32, in the order of `POLICY_SUMS`."""
    maxima: torch.Tensor
    """[2] fp32: the largest ratio, and minus the smallest; -inf without tokens."""

    def __add__(self, other: "PolicyStatistics") -> "PolicyStatistics":
        return PolicyStatistics(sums=self.sums + other.sums, maxima=torch.maximum(self.maxima, other.maxima))

    def total(self, name: str) -> torch.Tensor:
        """Return the sum called `name` in `POLICY_SUMS`, 0-dim."""
        return self.sums[POLICY_SUMS.index(name)]

    def mean(self, name: str) -> torch.Tensor:
        """Return the sum called `name` divided by the number of trained tokens, 0-dim."""
        return self.total(name) / self.num_tokens.clamp(min=1)

    @property
    def num_tokens(self) -> torch.Tensor:
        """Trained tokens."""
        return self.total("num_tokens")

    @property
    def policy_loss(self) -> torch.Tensor:
        """Mean of the clipped term alone (with importance weights)."""
        return self.mean("policy_loss")

    @property
    def entropy(self) -> torch.Tensor:
        """Mean entropy in nats; 0 without entropies."""
        return self.mean("entropy")

    @property
    def kl_reference(self) -> torch.Tensor:
        """Mean KL estimate to the reference policy in nats; 0 without a reference."""
        return self.mean("kl_reference")

    @property
    def clip_fraction(self) -> torch.Tensor:
        """Fraction of tokens whose ratio is outside the clip range on the side where clipping acts."""
        return self.mean("num_clipped")

    @property
    def dual_clip_fraction(self) -> torch.Tensor:
        """Fraction of tokens clipped by the dual clip."""
        return self.mean("num_dual_clipped")

    @property
    def approximate_kl(self) -> torch.Tensor:
        """Mean k3 estimate of KL(old policy ‖ new policy) in nats."""
        return self.mean("kl_k3")

    @property
    def approximate_kl_k1(self) -> torch.Tensor:
        """Mean of log p_old - log p_new in nats; may be negative."""
        return self.mean("kl_k1")

    @property
    def ratio_mean(self) -> torch.Tensor:
        """Mean of p_new / p_old."""
        return self.mean("ratio")

    @property
    def ratio_max(self) -> torch.Tensor:
        """Largest p_new / p_old; -inf without tokens."""
        return self.maxima[0]

    @property
    def ratio_min(self) -> torch.Tensor:
        """Smallest p_new / p_old; +inf without tokens."""
        return -self.maxima[1]

    @property
    def num_nonfinite(self) -> torch.Tensor:
        """Trained tokens whose log-ratio, loss or gradient is NaN or infinite: counted, not replaced."""
        return self.total("num_nonfinite")


def ppo_policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy_T: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs_T: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    importance_weights_T: torch.Tensor | None = None,
    denominator: float | torch.Tensor,
) -> tuple[torch.Tensor, PolicyStatistics]:
    """Return (loss, statistics): the definition of `glm_rlhf.kernels.rl.policy_loss.ppo_policy_loss`.

    Arithmetic is fp32, or fp64 if `logprobs_T` is fp64.
    """
    dtype = torch.float64 if logprobs_T.dtype == torch.float64 else torch.float32

    def trained(source_T: torch.Tensor) -> torch.Tensor:
        return torch.where(mask_T, source_T.to(dtype), 0.0)

    logprob_T, old_logprob_T = trained(logprobs_T), trained(old_logprobs_T.detach())
    advantage_T = trained(advantages_T.detach())
    log_ratio_T = logprob_T - old_logprob_T
    with torch.no_grad():
        ratio_T = torch.exp(log_ratio_T)
        unclipped_T = -advantage_T * ratio_T
        bound_T = -advantage_T * ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
        is_clipped_T = bound_T > unclipped_T
        is_dual_clipped_T = torch.zeros_like(mask_T)
        if dual_clip is not None:
            ceiling_T = -advantage_T * dual_clip
            is_dual_clipped_T = (advantage_T < 0) & (
                torch.where(is_clipped_T, bound_T, unclipped_T) > ceiling_T
            )
            bound_T = torch.where(is_dual_clipped_T, ceiling_T, bound_T)
    # Clipped tokens are replaced before the exponential: its overflow times zero would be NaN.
    is_unclipped_T = ~(is_clipped_T | is_dual_clipped_T)
    free_loss_T = -advantage_T * torch.exp(torch.where(is_unclipped_T, log_ratio_T, 0.0))
    policy_loss_T = torch.where(is_unclipped_T, free_loss_T, bound_T)
    if importance_weights_T is not None:
        policy_loss_T = policy_loss_T * trained(importance_weights_T.detach())

    objective_T = policy_loss_T
    zeros_T = torch.zeros_like(log_ratio_T)
    entropy_or_zero_T = zeros_T if entropy_T is None else trained(entropy_T)
    if entropy_coef != 0.0:
        objective_T = objective_T - entropy_coef * entropy_or_zero_T
    kl_T = zeros_T
    if ref_logprobs_T is not None:
        kl_T = token_kl(logprob_T - trained(ref_logprobs_T.detach()), kl_estimator)
        if kl_coef != 0.0:
            objective_T = objective_T + kl_coef * kl_T
    objective = objective_T.sum()

    with torch.no_grad():
        # The closed form of d(objective) / d(logprob) is finite exactly where these are.
        is_finite_T = log_ratio_T.isfinite() & objective_T.isfinite()
        sums = torch.stack(
            [
                source_T.detach().to(dtype).sum()
                for source_T in (
                    objective_T,
                    mask_T,
                    policy_loss_T,
                    entropy_or_zero_T,
                    kl_T,
                    is_clipped_T & mask_T,
                    is_dual_clipped_T & mask_T,
                    -log_ratio_T,
                    # KL(old ‖ new) from tokens of the old policy: the ratio enters upside down.
                    token_kl(-log_ratio_T, "k3"),
                    torch.where(mask_T, ratio_T, 0.0),
                    mask_T & ~is_finite_T,
                )
            ]
        )
        # The extra entry makes the maximum over zero tokens -inf.
        lowest = ratio_T.new_full((1,), -torch.inf)
        maxima = torch.stack(
            [
                torch.cat((torch.where(mask_T, source_T, -torch.inf), lowest)).amax()
                for source_T in (ratio_T, -ratio_T)
            ]
        )
    return objective / denominator, PolicyStatistics(sums=sums.float(), maxima=maxima.float())
