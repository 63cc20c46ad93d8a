"""Log-probability of the target from hidden states, without materialising the `[T, V]` logits."""

from collections.abc import Callable

import torch

from glm_rlhf.kernels.lm_head import reference_linear_logprob as reference
from glm_rlhf.kernels.lm_head import vocab_head
from glm_rlhf.kernels.lm_head.softmax_statistics import (
    RowDistribution,
    SoftmaxStatistics,
    check_temperature,
)
from glm_rlhf.kernels.lm_head.targets import IGNORE_INDEX, rows_with_gradient, rows_with_target

__all__ = ["IGNORE_INDEX", "linear_logprob", "shard_gradients", "shard_statistics", "sharded_linear_logprob"]


def linear_logprob(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logprob of each row's target and the entropy of each row's distribution.

    z[t, j] = hidden[t] . weight[j] / temperature, p[t] = softmax(z[t]),
    logprobs[t] = log p[t, targets[t]], entropy[t] = -sum_j p[t, j] log p[t, j] (of the tempered p).

    Row t predicts `targets_T[t]`: the caller pairs the hidden state of token t - 1 with token t.
    Differentiable in hidden and weight through both outputs; backward recomputes the logits, and skips rows
    whose gradient is zero.

    Args:
        hidden_TD: `[T, D]` float. On CUDA bf16 and float32 have kernels, other dtypes use the reference.
        weight_VD: `[V, D]`, same dtype.
        targets_T: int64 or int32 `[T]`; rows with `IGNORE_INDEX` (-100) are removed before any matrix product
            and give logprob 0, entropy 0 and a gradient of exactly zero.
        temperature: divides the logits, 1e-6 to 1e6.

    Returns:
        `(logprobs_T, entropy_T)`, float32 `[T]` (float64 for float64 inputs). A row without a finite logit
        is NaN, as in `log_softmax`.

    Raises:
        ValueError: shapes or dtypes disagree, a target is out of range, or temperature is out of range.
    """
    return sharded_linear_logprob(
        hidden_TD, weight_VD, targets_T, temperature=temperature, vocab_size=weight_VD.shape[0]
    )


def sharded_linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int,
    vocab_offset: int = 0,
    reduce_statistics: Callable[[SoftmaxStatistics], SoftmaxStatistics] | None = None,
    reduce_hidden_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `linear_logprob` over a sharded vocabulary; `weight_VD` is one shard.

    Args:
        hidden_TD, targets_T, temperature: as in `linear_logprob`, equal on all shards.
        weight_VD: `[V / shards, D]`, rows from `vocab_offset` on.
        vocab_size: ids in the whole vocabulary, for the range check of the targets.
        vocab_offset: id of the shard's first row.
        reduce_statistics: combines this shard's statistics with those of all shards; called once per forward.
        reduce_hidden_gradient: sums this shard's `[rows, D]` float32 contribution over all shards; called
            once per backward. None leaves the sum to the caller.

    Returns:
        `(logprobs_T, entropy_T)`, equal on all shards.

    Raises:
        ValueError: as `linear_logprob`.
    """
    check_head_inputs(hidden_TD, weight_VD, targets_T, temperature)
    return _LinearLogprob.apply(
        hidden_TD,
        weight_VD,
        targets_T,
        rows_with_target(targets_T, vocab_size),
        temperature,
        vocab_offset,
        reduce_statistics,
        reduce_hidden_gradient,
    )


def shard_statistics(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_offset: int = 0,
    temperature: float = 1.0,
) -> SoftmaxStatistics:
    """Return one shard's softmax statistics (max, sum_exp, weighted_sum, target_logit), float32 `[T]`.

    Every row must have a target: the caller has removed those with `IGNORE_INDEX`. Not differentiable.
    """
    head = vocab_head if vocab_head.is_supported(hidden_TD) else reference
    return head.shard_statistics(
        hidden_TD, weight_VD, targets_T, vocab_offset=vocab_offset, temperature=temperature
    )


def shard_gradients(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
    *,
    vocab_offset: int = 0,
    temperature: float = 1.0,
    wants_hidden: bool = True,
    wants_weight: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return `(dhidden_TD, dweight_VD)`: this shard's contributions, from recomputed logits.

    Args:
        distribution: of the tempered logits over the whole vocabulary, float32 `[T]` each.
        dlogprob_T, dentropy_T: float32 `[T]`, upstream gradients; None means zero.
        wants_hidden, wants_weight: which of the two gradients to compute.

    Returns:
        `dhidden_TD` float32, summed over this shard's columns only, and `dweight_VD` in the weight's dtype,
        accumulated in float32.
    """
    head = vocab_head if vocab_head.is_supported(hidden_TD) else reference
    return head.shard_gradients(
        hidden_TD,
        weight_VD,
        targets_T,
        distribution,
        dlogprob_T,
        dentropy_T,
        vocab_offset=vocab_offset,
        temperature=temperature,
        wants_hidden=wants_hidden,
        wants_weight=wants_weight,
    )


def check_head_inputs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, temperature: float
) -> None:
    """Raise ValueError if hidden, weight, targets and temperature are inconsistent."""
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"linear_logprob: hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)} given, "
            "[T, D] and [V, D] required; flatten batch and sequence into T"
        )
    if targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"linear_logprob: targets {tuple(targets_T.shape)} given, [{hidden_TD.shape[0]}] required: "
            "one target per row of hidden"
        )
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"linear_logprob: hidden is {hidden_TD.dtype}, weight is {weight_VD.dtype}; "
            "convert one of them so that both agree"
        )
    check_temperature("linear_logprob", temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        rows: torch.Tensor | None,
        temperature: float,
        vocab_offset: int,
        reduce_statistics: Callable[[SoftmaxStatistics], SoftmaxStatistics] | None,
        reduce_hidden_gradient: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = shard_statistics(
            _take(hidden_TD, rows),
            weight_VD,
            _take(targets_T, rows),
            vocab_offset=vocab_offset,
            temperature=temperature,
        )
        if reduce_statistics is not None:
            statistics = reduce_statistics(statistics)
        logprobs_T, distribution = statistics.logprob()
        # Backward keeps its own copy of the entropy: a caller may change the returned tensor in place.
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, rows, *distribution)
        ctx.temperature, ctx.vocab_offset = temperature, vocab_offset
        ctx.reduce_hidden_gradient = reduce_hidden_gradient
        ctx.set_materialize_grads(False)
        num_rows = targets_T.shape[0]
        return _spread(logprobs_T, rows, num_rows), _spread(distribution.entropy_T.clone(), rows, num_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        dlogprobs_T: torch.Tensor | None,
        dentropy_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, rows, *saved = ctx.saved_tensors
        distribution = RowDistribution(*saved)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        if dlogprobs_T is None and dentropy_T is None:
            return (None,) * 8
        upstream = [
            None if g is None else _take(g, rows).to(distribution.max_T.dtype)
            for g in (dlogprobs_T, dentropy_T)
        ]
        live = rows_with_gradient(*upstream)
        kept = live if rows is None else _take(rows, live)
        dhidden_TD, dweight_VD = shard_gradients(
            _take(hidden_TD, kept),
            weight_VD,
            _take(targets_T, kept),
            distribution.taken(live),
            *(None if g is None else _take(g, live) for g in upstream),
            vocab_offset=ctx.vocab_offset,
            temperature=ctx.temperature,
            wants_hidden=wants_hidden,
            wants_weight=wants_weight,
        )
        if wants_hidden:
            if ctx.reduce_hidden_gradient is not None:
                # The reduced size depends only on the targets: ranks whose gradients differ in the last bit
                # (one rounds to zero) must still call a collective of the same size.
                dhidden_TD = ctx.reduce_hidden_gradient(
                    _spread(dhidden_TD, live, distribution.max_T.shape[0])
                )
                kept = rows
            dhidden_TD = _spread(dhidden_TD.to(hidden_TD.dtype), kept, hidden_TD.shape[0])
        return dhidden_TD, dweight_VD, *(None,) * 6


def _take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _spread(tensor: torch.Tensor, rows: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    if rows is None:
        return tensor
    return tensor.new_zeros(num_rows, *tensor.shape[1:]).index_copy_(0, rows, tensor)
