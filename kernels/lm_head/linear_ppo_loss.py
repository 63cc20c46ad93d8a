"""PPO's policy loss and the negative log-likelihood from hidden states, with their gradients."""

from dataclasses import dataclass

import torch

from glm_rlhf.kernels.dispatch.arguments import check_denominator, check_mask, check_vectors
from glm_rlhf.kernels.lm_head.linear_loss import RowLoss, linear_loss
from glm_rlhf.kernels.lm_head.targets import IGNORE_INDEX
from glm_rlhf.kernels.rl.policy_loss import ppo_policy_loss
from glm_rlhf.kernels.rl.reference_policy_loss import PolicyStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class NllStatistics:
    """Statistics of supervised training, as one vector that is summed over chunks and ranks."""

    sums: torch.Tensor
    """[4] float32: rows with a nonzero weight; their negative log-likelihood, unweighted; their entropy;
    rows whose logprob is NaN or infinite, which are counted, not replaced."""

    def __add__(self, other: "NllStatistics") -> "NllStatistics":
        return NllStatistics(sums=self.sums + other.sums)

    @property
    def num_tokens(self) -> torch.Tensor:
        """Rows with a target and a nonzero weight."""
        return self.sums[0]

    @property
    def nll(self) -> torch.Tensor:
        """Mean negative log-likelihood in nats; 0 without tokens."""
        return self.sums[1] / self.sums[0].clamp(min=1)

    @property
    def entropy(self) -> torch.Tensor:
        """Mean entropy in nats; 0 without tokens."""
        return self.sums[2] / self.sums[0].clamp(min=1)

    @property
    def num_nonfinite(self) -> torch.Tensor:
        """Rows whose logprob is NaN or infinite."""
        return self.sums[3]


def linear_ppo_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs_T: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    importance_weights_T: torch.Tensor | None = None,
    temperature: float = 1.0,
    denominator: float | torch.Tensor,
) -> tuple[torch.Tensor, PolicyStatistics]:
    """Return `(loss, statistics)` of `ppo_policy_loss` on the logprobs of `linear_logprob`.

    The formula is that of `ppo_policy_loss`, with logprobs and entropy at the given temperature. It is
    evaluated inside the pass over the vocabulary head, so that forward and backward take three matrix
    products, not four; masked rows take none, clipped rows without an entropy or KL term take one.

    Args:
        hidden_TD: [T, D] float; row t predicts `targets_T[t]`.
        weight_VD: [V, D], same dtype. Its gradient is skipped if it needs none.
        targets_T: [T] int, token ids; read only where the mask is true. `IGNORE_INDEX` masks the row too.
        old_logprobs_T, advantages_T, mask_T, clip_low, clip_high, dual_clip, entropy_coef, ref_logprobs_T,
        kl_coef, kl_estimator, importance_weights_T, denominator: as in `ppo_policy_loss`.
        temperature: divides the logits, 1e-6 to 1e6; the temperature of the old logprobs.

    Returns:
        loss: 0-dim fp32 (fp64 for fp64 inputs), differentiable once in hidden and weight.
        PolicyStatistics: as of `ppo_policy_loss`, always with entropy.

    Raises:
        ValueError: as `linear_logprob` and `ppo_policy_loss`.
    """
    targets_T, row_loss = ppo_row_loss(
        targets_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        ref_logprobs_T=ref_logprobs_T,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        importance_weights_T=importance_weights_T,
        denominator=denominator,
    )
    return linear_loss(hidden_TD, weight_VD, targets_T, row_loss, temperature=temperature)


def linear_nll_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    weights_T: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    denominator: float | torch.Tensor,
) -> tuple[torch.Tensor, NllStatistics]:
    """Return `(loss, statistics)` of supervised training: loss = -sum_t w_t logprobs_T[t] / denominator.

    Args:
        hidden_TD, weight_VD, targets_T, temperature: as in `linear_logprob`.
        weights_T: [T] float, w_t; a row of weight 0 is skipped. None: every weight is 1. A constant.
        denominator: divides the sum, e.g. the number of trained tokens over all micro-batches and
            data-parallel ranks. The host does not wait for a tensor.

    Returns:
        loss: 0-dim fp32 (fp64 for fp64 inputs), differentiable once in hidden and weight.
        NllStatistics: sums over the rows that were not skipped, not differentiable.

    Raises:
        ValueError: as `linear_logprob`, or the weights or the denominator do not fit.
    """
    targets_T, row_loss = nll_row_loss(targets_T, weights_T, denominator=denominator)
    return linear_loss(hidden_TD, weight_VD, targets_T, row_loss, temperature=temperature)


def ppo_row_loss(
    targets_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    ref_logprobs_T: torch.Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    importance_weights_T: torch.Tensor | None,
    denominator: float | torch.Tensor,
) -> tuple[torch.Tensor, RowLoss]:
    """Return the targets with `IGNORE_INDEX` in masked rows, and PPO's loss for `linear_loss`.

    Raises:
        ValueError: a vector's length or the mask's dtype does not fit.
    """
    num_rows = targets_T.numel()
    check_vectors(
        targets_T=(targets_T, num_rows),
        old_logprobs_T=(old_logprobs_T, num_rows),
        advantages_T=(advantages_T, num_rows),
        mask_T=(mask_T, num_rows),
        ref_logprobs_T=(ref_logprobs_T, num_rows),
        importance_weights_T=(importance_weights_T, num_rows),
    )
    check_mask("mask_T", mask_T)

    def row_loss(
        logprobs_R: torch.Tensor, entropy_R: torch.Tensor, rows_R: torch.Tensor
    ) -> tuple[torch.Tensor, PolicyStatistics]:
        return ppo_policy_loss(
            logprobs_R,
            old_logprobs_T[rows_R],
            advantages_T[rows_R],
            mask_T[rows_R],
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            # Without a coefficient the entropy is only a statistic: its gradient would be zeros.
            entropy_T=entropy_R if entropy_coef != 0.0 else entropy_R.detach(),
            entropy_coef=entropy_coef,
            ref_logprobs_T=None if ref_logprobs_T is None else ref_logprobs_T[rows_R],
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            importance_weights_T=None if importance_weights_T is None else importance_weights_T[rows_R],
            denominator=denominator,
        )

    return torch.where(mask_T, targets_T, IGNORE_INDEX), row_loss


def nll_row_loss(
    targets_T: torch.Tensor, weights_T: torch.Tensor | None, *, denominator: float | torch.Tensor
) -> tuple[torch.Tensor, RowLoss]:
    """Return the targets with `IGNORE_INDEX` in rows of weight 0, and the likelihood loss for `linear_loss`.

    Raises:
        ValueError: the weights' length or the denominator does not fit.
    """
    check_vectors(targets_T=(targets_T, targets_T.numel()), weights_T=(weights_T, targets_T.numel()))
    check_denominator(denominator)

    def row_loss(
        logprobs_R: torch.Tensor, entropy_R: torch.Tensor, rows_R: torch.Tensor
    ) -> tuple[torch.Tensor, NllStatistics]:
        weighted_R = logprobs_R if weights_T is None else logprobs_R * weights_T[rows_R]
        with torch.no_grad():
            count = logprobs_R.new_full((), rows_R.shape[0])
            num_nonfinite = (~logprobs_R.isfinite()).sum()
            sums = torch.stack([count, -logprobs_R.sum(), entropy_R.sum(), num_nonfinite])
        return -weighted_R.sum() / denominator, NllStatistics(sums=sums.float())

    return targets_T if weights_T is None else torch.where(weights_T != 0, targets_T, IGNORE_INDEX), row_loss
