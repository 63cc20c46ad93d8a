"""Per-sequence outputs, also with context parallelism.

All functions are called on the last stage by every tensor- and context-parallel rank. Except for
`answer_nll`, results are equal on all of these ranks, and differentiable: each rank's gradient is that of its
own rows under the whole loss. A loss of these numbers is computed on every context-parallel rank, and counted
on one.
"""

import torch
import torch.distributed as dist

from glm_rlhf.kernels.lm_head.linear_ppo_loss import NllStatistics
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import ContextShard
from glm_rlhf.parallel.model.token_outputs import next_tokens, shift_to_rows, token_logprobs, token_values
from glm_rlhf.parallel.model.vocab_parallel_loss import linear_nll_loss


def answer_nll(
    model: GLMModel,
    hidden_TD: torch.Tensor,
    mine: ContextShard,
    is_trained_T: torch.Tensor,
    *,
    denominator: float,
) -> tuple[torch.Tensor, NllStatistics]:
    """Return `(loss, statistics)` of this rank's rows.

    loss = −sum over trained tokens t of log p(token t | tokens before t), divided by `denominator`. The loss
    of the whole stream is the sum over context-parallel ranks. The tensor-parallel group communicates.

    Args:
        model: last chunk of a policy.
        hidden_TD: its output for `mine`.
        mine: this rank's part of the stream.
        is_trained_T: bool [T] of the whole stream, tokens that the loss counts.
        denominator: tokens that the loss counts in the whole step, over all micro-batches and ranks.
    """
    return linear_nll_loss(
        hidden_TD,
        model.output_weight_VD,
        mine.take(next_tokens(mine.packed, is_trained_T)),
        group=model.topology.tp_group,
        denominator=denominator,
        vocab_size=model.glm.vocab_size,
        # With sequence parallelism the backward of the gather that made hidden_TD sums the gradients.
        reduces_hidden_gradient=not model.config.sequence_parallel,
    )


def last_token_values(model: GLMModel, hidden_TD: torch.Tensor, mine: ContextShard) -> torch.Tensor:
    """Return the scalar at each sequence's last token, fp32 [B]: a reward model's scores.

    The context-parallel group all-reduces 4 B bytes.

    Args:
        model: last chunk of a reward model or critic.
        hidden_TD: its output for `mine`.
        mine: this rank's part of the stream.

    Raises:
        ValueError: a sequence is empty and has no last token.
    """
    packed, device = mine.packed, hidden_TD.device
    if 0 in packed.lengths:
        raise ValueError(f"sequence {packed.lengths.index(0)} of the stream has no token to be scored at")
    last_B = (torch.tensor(packed.lengths).cumsum(0) - 1).to(device, non_blocking=True)
    if mine.rows is None:
        return token_values(model, hidden_TD[last_B])
    local_row_T = torch.full((packed.num_tokens,), -1, device=device)
    local_row_T[mine.rows] = torch.arange(mine.rows.shape[0], device=device)
    local_row_B = local_row_T[last_B]
    values_B = token_values(model, hidden_TD[local_row_B.clamp(min=0)])
    return _SumOverContext.apply(torch.where(local_row_B >= 0, values_B, 0.0), model.topology.cp_group)


def sequence_logprobs(
    model: GLMModel, hidden_TD: torch.Tensor, mine: ContextShard, weights_T: torch.Tensor
) -> torch.Tensor:
    """Return sum_t weights_T[t] · log p(token t | tokens before t) of each sequence, fp32 [B].

    The tensor-parallel group communicates, the context-parallel group all-reduces 4 B bytes.

    Args:
        model: last chunk of a policy.
        hidden_TD: its output for `mine`.
        mine: this rank's part of the stream.
        weights_T: fp32 [T] of the whole stream, at least 0; tokens of weight 0 are skipped. A sequence's
            first token has no logprob and is not counted.
    """
    packed = mine.packed
    targets_T = mine.take(next_tokens(packed, weights_T > 0))
    logprobs_T, _ = token_logprobs(model, hidden_TD, targets_T)
    weighted_T = logprobs_T * mine.take(shift_to_rows(weights_T))
    if mine.rows is not None:
        weighted_T = weighted_T.new_zeros(packed.num_tokens).index_copy(0, mine.rows, weighted_T)
    # No scatter_add: on CUDA its order of summation changes from run to run.
    sums_B = torch.stack([part.sum() for part in packed.split(weighted_T)])
    return sums_B if mine.rows is None else _SumOverContext.apply(sums_B, model.topology.cp_group)


class _SumOverContext(torch.autograd.Function):
    """A sum over ranks; backward passes the whole gradient to each rank's own term."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, values: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return upstream, None
