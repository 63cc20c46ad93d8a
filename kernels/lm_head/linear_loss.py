"""A loss of logprobs and entropies with its gradients, from one pass over the vocabulary head.

Backward of a loss on top of `linear_logprob` computes the logits a second time. If the loss is a sum over
rows of a function of that row's logprob and entropy, its gradient is known as soon as the row's logprob is:
the logits of a chunk of rows are kept until then, which takes three matrix products instead of four.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.dispatch.launch import CompileCase
from glm_rlhf.kernels.lm_head import reference_linear_loss as reference
from glm_rlhf.kernels.lm_head import vocab_head
from glm_rlhf.kernels.lm_head.linear_logprob import check_head_inputs, shard_statistics
from glm_rlhf.kernels.lm_head.reference_linear_logprob import math_dtype, slices
from glm_rlhf.kernels.lm_head.softmax_statistics import RowDistribution, SoftmaxStatistics
from glm_rlhf.kernels.lm_head.targets import rows_with_gradient, rows_with_target


class Addable(Protocol):
    """Statistics that add up over chunks."""

    def __add__(self, other: "Addable") -> "Addable": ...


Statistics = TypeVar("Statistics", bound=Addable)
RowLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Statistics]]
"""`(logprobs_R, entropy_R, rows_R) -> (loss, statistics)`: differentiable; a sum over rows, whose terms
depend only on the row's own logprob and entropy. `rows_R` are the rows' indices into T."""


def linear_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    row_loss: RowLoss,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    vocab_offset: int = 0,
    shard_columns: int | None = None,
    reduce_statistics: Callable[[SoftmaxStatistics], SoftmaxStatistics] | None = None,
    start_hidden_reduction: Callable[[torch.Tensor], Callable[[], torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, Statistics]:
    """Return `(loss, statistics)` of `row_loss` over the rows that have a target; computes the gradients too.

    loss = sum over chunks of row_loss(logprobs, entropy, rows). The gradients with respect to hidden and
    weight are computed here, chunk by chunk: backward only scales them by the upstream scalar, once.
    Rows with `IGNORE_INDEX` are removed before any matrix product; rows whose gradient is exactly zero are
    removed before the last two, which does not change the other rows' gradients of hidden in any bit.

    Memory in addition to hidden, weight and their gradients: the kept logits of one chunk (`CHUNK_BYTES` on
    CUDA). With several chunks the weight's gradient is accumulated in float32.

    Args:
        hidden_TD, weight_VD, targets_T, temperature: as in `linear_logprob`.
        row_loss: see `RowLoss`; called once per chunk, also with zero rows.
        vocab_size, vocab_offset: as in `sharded_linear_logprob`; by default the weight is the vocabulary.
        shard_columns: columns per shard that determine the chunking, equal on all shards.
        reduce_statistics: combines this shard's statistics with those of all shards; called once per chunk.
        start_hidden_reduction: starts the sum over all shards of a `[rows, D]` float32 tensor and returns a
            function that waits for it; the weight's matrix product runs in between. None leaves the sum to
            the caller.

    Returns:
        loss: 0-dim, differentiable in hidden and weight; its backward runs once. Fold constant factors into
            the row loss: an upstream gradient that is no power of two rounds bf16 gradients a second time.
        statistics: the sum of the statistics of `row_loss`.

    Raises:
        ValueError: as `linear_logprob`.
        RuntimeError: backward runs a second time.
    """
    check_head_inputs(hidden_TD, weight_VD, targets_T, temperature)
    rows = rows_with_target(targets_T, weight_VD.shape[0] if vocab_size is None else vocab_size)
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_TD, weight_VD)]
    with torch.no_grad():
        loss, statistics, dhidden_RD, dweight_VD = _sweep(
            hidden_TD.detach(),
            weight_VD.detach(),
            targets_T,
            rows,
            row_loss,
            wants,
            temperature,
            vocab_offset,
            weight_VD.shape[0] if shard_columns is None else shard_columns,
            reduce_statistics,
            start_hidden_reduction,
        )
    return _WithGradients.apply(hidden_TD, weight_VD, loss, rows, [dhidden_RD, dweight_VD]), statistics


def _sweep(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    rows: torch.Tensor | None,
    row_loss: RowLoss,
    wants: list[bool],
    temperature: float,
    vocab_offset: int,
    shard_columns: int,
    reduce_statistics: Callable[[SoftmaxStatistics], SoftmaxStatistics] | None,
    start_hidden_reduction: Callable[[torch.Tensor], Callable[[], torch.Tensor]] | None,
) -> tuple[torch.Tensor, Statistics, torch.Tensor | None, torch.Tensor | None]:
    head = vocab_head if vocab_head.is_supported(hidden_TD) else reference
    num_rows = targets_T.shape[0] if rows is None else rows.shape[0]
    chunks = _even_chunks(num_rows, head.rows_per_chunk(shard_columns, hidden_TD))
    wants_hidden, wants_weight = wants
    dtype = math_dtype(hidden_TD)
    # Gradients have the dtype that backward returns, but sums of several products are float32.
    weight_dtype = weight_VD.dtype if head is vocab_head and len(chunks) <= 1 else dtype
    hidden_dtype = hidden_TD.dtype if head is vocab_head else dtype
    width = hidden_TD.shape[1]
    dhidden_RD = hidden_TD.new_empty(num_rows, width, dtype=hidden_dtype) if wants_hidden else None
    dweight_VD = torch.empty_like(weight_VD, dtype=weight_dtype) if wants_weight else None
    placement = {"vocab_offset": vocab_offset, "temperature": temperature}
    is_first = True
    loss = statistics = None
    for chunk in chunks:
        taken = chunk if rows is None else rows[chunk]  # a slice copies nothing
        hidden_CD, targets_C = hidden_TD[taken], targets_T[taken]
        if wants_hidden or wants_weight:
            softmax, kept = head.keep_logits(hidden_CD, weight_VD, targets_C, **placement)
        else:
            softmax = shard_statistics(hidden_CD, weight_VD, targets_C, **placement)
        if reduce_statistics is not None:
            softmax = reduce_statistics(softmax)
        logprobs_C, distribution = softmax.logprob()
        part, part_statistics, dlogprob_C, dentropy_C = _row_gradients(
            row_loss, logprobs_C, distribution, _indices(taken, targets_T.device)
        )
        loss = part if loss is None else loss + part
        statistics = part_statistics if statistics is None else statistics + part_statistics
        if not wants_hidden and not wants_weight:
            continue
        live = rows_with_gradient(dlogprob_C, dentropy_C)
        dlogits_LV, order = head.dlogits_of_kept(
            kept, targets_C, distribution, dlogprob_C, dentropy_C, live, **placement
        )
        finish = None
        if wants_hidden:
            dhidden_CD = hidden_CD.new_empty(dlogits_LV.shape[0], width, dtype=dtype)
            head.add_product_(dhidden_CD, dlogits_LV, weight_VD, is_first=True)
            if order is not None:
                dhidden_CD = dhidden_CD.new_zeros(hidden_CD.shape).index_copy_(0, order, dhidden_CD)
            if start_hidden_reduction is not None:
                finish = start_hidden_reduction(dhidden_CD)
        if wants_weight and dlogits_LV.shape[0] > 0:
            hidden_LD = hidden_CD if order is None else hidden_CD[order]
            head.add_product_(dweight_VD, dlogits_LV.t(), hidden_LD, is_first=is_first)
            is_first = False
        if wants_hidden:
            dhidden_RD[chunk] = dhidden_CD if finish is None else finish()
    if wants_weight and is_first:
        dweight_VD.zero_()
    return loss, statistics, dhidden_RD, dweight_VD


def _indices(taken: torch.Tensor | slice, device: torch.device) -> torch.Tensor:
    return torch.arange(taken.start, taken.stop, device=device) if isinstance(taken, slice) else taken


def _row_gradients(
    row_loss: RowLoss, logprobs_C: torch.Tensor, distribution: RowDistribution, chunk_rows: torch.Tensor
) -> tuple[torch.Tensor, Statistics, torch.Tensor, torch.Tensor | None]:
    """Return (loss, statistics, d(loss)/d(logprobs), d(loss)/d(entropy) or None) of one chunk."""
    with torch.enable_grad():
        logprobs_C = logprobs_C.detach().requires_grad_()
        entropy_C = distribution.entropy_T.detach().clone().requires_grad_()
        loss, statistics = row_loss(logprobs_C, entropy_C, chunk_rows)
        dlogprob_C, dentropy_C = torch.autograd.grad(loss, (logprobs_C, entropy_C), allow_unused=True)
    dlogprob_C = torch.zeros_like(logprobs_C) if dlogprob_C is None else dlogprob_C
    return loss.detach(), statistics, dlogprob_C, dentropy_C


def _even_chunks(num_rows: int, largest: int) -> list[slice]:
    """Return slices of about equal size, in whole tiles; one empty slice if there is no row."""
    if num_rows == 0:
        return [slice(0, 0)]
    tile = vocab_head.HOPPER.rows
    size = triton.cdiv(num_rows, triton.cdiv(num_rows, largest))
    return list(slices(num_rows, min(largest, triton.cdiv(size, tile) * tile)))


class _WithGradients(torch.autograd.Function):
    """The loss with precomputed gradients: backward scales and returns them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        loss: torch.Tensor,
        rows: torch.Tensor | None,
        gradients: list[torch.Tensor | None],
    ) -> torch.Tensor:
        ctx.gradients, ctx.rows = gradients, rows
        ctx.num_rows, ctx.dtypes = hidden_TD.shape[0], (hidden_TD.dtype, weight_VD.dtype)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_loss: backward ran a second time; its gradients were scaled in place and returned "
                "the first time, so call the loss again instead of retaining the graph"
            )
        dhidden_RD, dweight_VD = (
            None if gradient is None else _scaled(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        if dhidden_RD is not None and ctx.rows is not None:
            dhidden_TD = dhidden_RD.new_zeros(ctx.num_rows, dhidden_RD.shape[1])
            dhidden_RD = dhidden_TD.index_copy_(0, ctx.rows, dhidden_RD)
        return dhidden_RD, dweight_VD, None, None, None


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `gradient * upstream` in `dtype`; reads and writes nothing if neither changes."""
    if not vocab_head.is_supported(gradient):
        if upstream == 1:
            return gradient.to(dtype)
        return (gradient * upstream).to(dtype) if gradient.dtype != dtype else gradient.mul_(upstream)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    num_elements = gradient.numel()
    _scale_kernel[(triton.cdiv(num_elements, SCALE_BLOCK),)](
        gradient,
        out,
        upstream.float(),
        num_elements,  # 16 per thread: bound by memory
        IS_IN_PLACE=out is gradient,
        BLOCK=SCALE_BLOCK,
        num_warps=8,
    )
    return out


SCALE_BLOCK = 4096


@triton.jit
def _scale_kernel(
    gradient_ptr, out_ptr, upstream_ptr, num_elements, IS_IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write gradient * upstream; reads and writes nothing if that changes nothing."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    upstream = tl.load(upstream_ptr + tl.zeros_like(index))
    changes = index < num_elements
    if IS_IN_PLACE:
        changes &= upstream != 1.0
    scaled = tl.load(gradient_ptr + index, mask=changes, other=0.0).to(tl.float32) * upstream
    tl.store(out_ptr + index, scaled.to(out_ptr.dtype.element_ty), mask=changes)


def compile_cases() -> list[CompileCase]:
    """Return the scaling of accumulated float32 gradients to bf16."""
    return [
        CompileCase(
            name="linear_loss_scale/9B/bf16",
            kernel=_scale_kernel,
            signature={
                "gradient_ptr": "*fp32",
                "out_ptr": "*bf16",
                "upstream_ptr": "*fp32",
                "num_elements": "i32",
                "IS_IN_PLACE": "constexpr",
                "BLOCK": "constexpr",
            },
            constexprs={"IS_IN_PLACE": False, "BLOCK": SCALE_BLOCK},
            divisible_by_16=("gradient_ptr", "out_ptr", "num_elements"),
            num_warps=8,
        )
    ]
