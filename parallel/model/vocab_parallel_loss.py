"""Vocabulary-parallel losses whose gradients are computed in forward.

Reductions over the group, for R rows that have a target, in C chunks (one for shards of a usual size):
C x (MAX of 4 R / C bytes, SUM of 12 R / C bytes), and with gradients C x SUM of 4 R D / C bytes, overlapped
with the matrix product of the weight's gradient. All are in forward; backward communicates nothing.
Every rank of the group must call, with equal arguments except for its shard.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from glm_rlhf.kernels.lm_head.linear_loss import Statistics, linear_loss
from glm_rlhf.kernels.lm_head.linear_ppo_loss import NllStatistics, nll_row_loss, ppo_row_loss
from glm_rlhf.kernels.rl.reference_policy_loss import PolicyStatistics
from glm_rlhf.parallel.model.vocab_parallel_logprob import place_shard, statistics_reduction, without_padding


def linear_ppo_loss(
    hidden_TD: torch.Tensor,
    weight_VD_shard: torch.Tensor,
    targets_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
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
    vocab_size: int | None = None,
    reduces_hidden_gradient: bool = True,
) -> tuple[torch.Tensor, PolicyStatistics]:
    """Return `(loss, statistics)` of `kernels.linear_ppo_loss`, equal on all ranks of `group`.

    Args:
        group, vocab_size, reduces_hidden_gradient: as in `vocab_parallel_logprob.linear_logprob`.
        Others: as in `kernels.linear_ppo_loss`.

    Raises:
        ValueError: as `kernels.linear_ppo_loss` and `vocab_parallel_logprob.linear_logprob`.
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
    return _sharded(
        hidden_TD,
        weight_VD_shard,
        targets_T,
        row_loss,
        group,
        temperature,
        vocab_size,
        reduces_hidden_gradient,
    )


def linear_nll_loss(
    hidden_TD: torch.Tensor,
    weight_VD_shard: torch.Tensor,
    targets_T: torch.Tensor,
    weights_T: torch.Tensor | None = None,
    *,
    group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    denominator: float | torch.Tensor,
    vocab_size: int | None = None,
    reduces_hidden_gradient: bool = True,
) -> tuple[torch.Tensor, NllStatistics]:
    """Return `(loss, statistics)` of `kernels.linear_nll_loss`, equal on all ranks of `group`.

    Args:
        group, vocab_size, reduces_hidden_gradient: as in `vocab_parallel_logprob.linear_logprob`.
        Others: as in `kernels.linear_nll_loss`.

    Raises:
        ValueError: as `kernels.linear_nll_loss` and `vocab_parallel_logprob.linear_logprob`.
    """
    targets_T, row_loss = nll_row_loss(targets_T, weights_T, denominator=denominator)
    return _sharded(
        hidden_TD,
        weight_VD_shard,
        targets_T,
        row_loss,
        group,
        temperature,
        vocab_size,
        reduces_hidden_gradient,
    )


def _sharded(
    hidden_TD: torch.Tensor,
    weight_VD_shard: torch.Tensor,
    targets_T: torch.Tensor,
    row_loss: Callable[..., tuple[torch.Tensor, Statistics]],
    group: dist.ProcessGroup | None,
    temperature: float,
    vocab_size: int | None,
    reduces_hidden_gradient: bool,
) -> tuple[torch.Tensor, Statistics]:
    num_columns, vocab_offset, vocab_size = place_shard(weight_VD_shard.shape[0], vocab_size, group)
    return linear_loss(
        hidden_TD,
        without_padding(weight_VD_shard, 0, num_columns),
        targets_T,
        row_loss,
        temperature=temperature,
        vocab_size=vocab_size,
        vocab_offset=vocab_offset,
        shard_columns=weight_VD_shard.shape[0],
        reduce_statistics=statistics_reduction(group),
        start_hidden_reduction=_started_sum(group) if reduces_hidden_gradient else None,
    )


def _started_sum(
    group: dist.ProcessGroup | None,
) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]] | None:
    """Return a function that starts an in-place sum over the group and returns its wait function."""
    if group is None or group.size() == 1:
        return None

    def start(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        if tensor.numel() == 0:  # the same on every rank: targets are
            return lambda: tensor
        work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return tensor

        return finish

    return start
