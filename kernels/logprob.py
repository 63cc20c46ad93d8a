"""Log-probability of the target from logits that exist already, with one read of each row."""

from collections.abc import Callable

import torch

from glm_rlhf.kernels.reference import logprob as reference
from glm_rlhf.kernels.softmax_statistics import RowDistribution, SoftmaxStatistics
from glm_rlhf.kernels.targets import IGNORE_INDEX, rows_with_target

__all__ = ["IGNORE_INDEX", "logprobs_from_logits", "sharded_logprobs_from_logits"]


def logprobs_from_logits(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    inplace_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logprob of each row's target and the entropy of each row's distribution.

    z[t] = logits[t] / temperature, logprobs[t] = log softmax(z[t])[targets[t]],
    entropy[t] = -sum_j p[t, j] log p[t, j]. Logits of -inf are columns of probability zero: they give no
    NaN in forward or backward. Differentiable in the logits through both outputs.

    Args:
        logits_TV: `[T, V]` float; rows may be strided, a row must be contiguous.
        targets_T: int64 or int32 `[T]`; rows with `IGNORE_INDEX` (-100) are not read and give logprob 0,
            entropy 0 and a gradient of exactly zero.
        temperature: divides the logits, > 0.
        inplace_gradient: backward writes the gradient over the logits and returns that memory: no second
            `[T, V]` tensor. Nothing else may read the logits after backward has begun, and backward runs
            once. The default allocates the gradient.

    Returns:
        `(logprobs_T, entropy_T)`, float32 `[T]` (float64 for float64 logits). A row without one finite
        logit is NaN, as in `log_softmax`.

    Raises:
        ValueError: shapes disagree, rows are not contiguous, temperature is not positive, or a target is
            out of range.
    """
    return sharded_logprobs_from_logits(
        logits_TV,
        targets_T,
        temperature=temperature,
        vocab_size=logits_TV.shape[-1],
        inplace_gradient=inplace_gradient,
    )


def sharded_logprobs_from_logits(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int,
    vocab_offset: int = 0,
    reduce_statistics: Callable[[SoftmaxStatistics], SoftmaxStatistics] | None = None,
    inplace_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `logprobs_from_logits` over a vocabulary of which `logits_TV` holds one shard's columns.

    Args:
        vocab_size: ids in the whole vocabulary, for the range check of the targets.
        vocab_offset: id of the shard's first column.
        reduce_statistics: makes the statistics of all shards out of this shard's; called once per forward.

    Raises:
        ValueError: as `logprobs_from_logits`.
    """
    if logits_TV.dim() != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"logprobs_from_logits: logits {tuple(logits_TV.shape)} and targets {tuple(targets_T.shape)} "
            "given, [T, V] and [T] required; flatten batch and sequence into T"
        )
    if logits_TV.shape[1] > 1 and logits_TV.stride(1) != 1:
        raise ValueError("logprobs_from_logits: rows of the logits must be contiguous; call .contiguous()")
    if not temperature > 0:
        raise ValueError(f"logprobs_from_logits: temperature {temperature} given, a number > 0 required")
    return _LogprobsFromLogits.apply(
        logits_TV, targets_T, temperature, vocab_size, vocab_offset, reduce_statistics, inplace_gradient
    )


class _LogprobsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits_TV: torch.Tensor,
        targets_T: torch.Tensor,
        temperature: float,
        vocab_size: int,
        vocab_offset: int,
        reduce_statistics: Callable[[SoftmaxStatistics], SoftmaxStatistics] | None,
        inplace_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows_with_target(targets_T, vocab_size)
        statistics = reference.logits_statistics(
            logits_TV, targets_T, vocab_offset=vocab_offset, temperature=temperature
        )
        if reduce_statistics is not None:
            statistics = reduce_statistics(statistics)
        logprobs_T, distribution = statistics.logprob()
        entropy_T = distribution.entropy_T.clone()
        ignored_T = targets_T == IGNORE_INDEX
        logprobs_T.masked_fill_(ignored_T, 0)
        entropy_T.masked_fill_(ignored_T, 0)
        ctx.save_for_backward(logits_TV, targets_T, *distribution)
        ctx.temperature, ctx.vocab_offset, ctx.inplace_gradient = temperature, vocab_offset, inplace_gradient
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        dlogprobs_T: torch.Tensor | None,
        dentropy_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        logits_TV, targets_T, *distribution = ctx.saved_tensors
        if dlogprobs_T is None and dentropy_T is None:
            return (None,) * 7
        out_TV = logits_TV.detach() if ctx.inplace_gradient else torch.empty_like(logits_TV)
        reference.logits_gradient(
            logits_TV,
            targets_T,
            RowDistribution(*distribution),
            dlogprobs_T,
            dentropy_T,
            vocab_offset=ctx.vocab_offset,
            temperature=ctx.temperature,
            out_TV=out_TV,
        )
        return out_TV, *(None,) * 6
