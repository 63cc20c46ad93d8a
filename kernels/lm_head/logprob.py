"""Log-probability of the target from existing logits, with one read of each row."""

from collections.abc import Callable

import torch
import triton

from glm_rlhf.kernels.dispatch.launch import CompileCase, uses_triton
from glm_rlhf.kernels.lm_head import reference_logprob as reference
from glm_rlhf.kernels.lm_head.logprob_kernels import _logprob_bwd_kernel, _logprob_fwd_kernel
from glm_rlhf.kernels.lm_head.softmax_statistics import (
    RowDistribution,
    SoftmaxStatistics,
    check_temperature,
)
from glm_rlhf.kernels.lm_head.targets import IGNORE_INDEX, rows_with_target

__all__ = ["IGNORE_INDEX", "logprobs_from_logits", "sharded_logprobs_from_logits"]

BLOCK_COLUMNS = 4096
"""8 KB of bf16: 16 elements per thread with 8 warps, two 16-byte loads in flight each."""


def logprobs_from_logits(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    inplace_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logprob of each row's target and the entropy of each row's distribution.

    z[t] = logits[t] / temperature, logprobs[t] = log softmax(z[t])[targets[t]],
    entropy[t] = -sum_j p[t, j] log p[t, j]. Logits of -inf have probability zero and cause no NaN in forward
    or backward. Differentiable in the logits through both outputs.

    Args:
        logits_TV: `[T, V]` float; rows may be strided, a row must be contiguous.
        targets_T: int64 or int32 `[T]`; rows with `IGNORE_INDEX` (-100) are not read and give logprob 0,
            entropy 0 and a gradient of exactly zero.
        temperature: divides the logits, 1e-6 to 1e6.
        inplace_gradient: backward overwrites the logits with the gradient and returns that memory: no second
            `[T, V]` tensor. Nothing else may read the logits after backward starts, and backward runs once.
            The default allocates the gradient.

    Returns:
        `(logprobs_T, entropy_T)`, float32 `[T]` (float64 for float64 logits). A row without a finite logit
        is NaN, as in `log_softmax`.

    Raises:
        ValueError: shapes disagree, rows are not contiguous, temperature is out of range, or a target is
            out of range (on CUDA such a row's logprob is NaN, so that the host need not wait).
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
    """Return `logprobs_from_logits` over a sharded vocabulary; `logits_TV` holds one shard's columns.

    Args:
        vocab_size: ids in the whole vocabulary, for the range check of the targets.
        vocab_offset: id of the shard's first column.
        reduce_statistics: combines this shard's statistics with those of all shards; called once per forward.

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
    check_temperature("logprobs_from_logits", temperature)
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
        if not logits_TV.is_cuda:  # on CUDA the kernel returns NaN, so that the host need not wait
            rows_with_target(targets_T, vocab_size)
        placement = {"vocab_offset": vocab_offset, "temperature": temperature}
        if _is_supported(logits_TV) and reduce_statistics is None:
            logprobs_T, entropy_T, distribution = _launch_whole(logits_TV, targets_T, vocab_size, **placement)
        else:
            if _is_supported(logits_TV):
                statistics = _launch_statistics(logits_TV, targets_T, vocab_size, **placement)
            else:
                statistics = reference.logits_statistics(logits_TV, targets_T, **placement)
            if reduce_statistics is not None:
                statistics = reduce_statistics(statistics)
            logprobs_T, distribution = statistics.logprob()
            is_ignored_T = targets_T == IGNORE_INDEX
            logprobs_T.masked_fill_(is_ignored_T, 0)
            entropy_T = distribution.entropy_T.masked_fill(is_ignored_T, 0)
        ctx.save_for_backward(logits_TV, targets_T, *distribution)
        ctx.placement, ctx.inplace_gradient = placement, inplace_gradient
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        dlogprobs_T: torch.Tensor | None,
        dentropy_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        logits_TV, targets_T, *saved = ctx.saved_tensors
        if dlogprobs_T is None and dentropy_T is None:
            return (None,) * 7
        out_TV = logits_TV.detach() if ctx.inplace_gradient else torch.empty_like(logits_TV)
        write = _launch_gradient if _is_supported(logits_TV) else reference.logits_gradient
        write(
            logits_TV,
            targets_T,
            RowDistribution(*saved),
            dlogprobs_T,
            dentropy_T,
            out_TV=out_TV,
            **ctx.placement,
        )
        if ctx.inplace_gradient:  # makes a second backward fail instead of reading gradients as logits
            torch.autograd.graph.increment_version(logits_TV)
        return out_TV, *(None,) * 6


def _is_supported(logits_TV: torch.Tensor) -> bool:
    return uses_triton(logits_TV) and logits_TV.dtype != torch.float64


def _launch_whole(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, vocab_size: int, vocab_offset: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, RowDistribution]:
    """Return (logprobs_T, entropy_T, distribution) of unsharded rows, in one launch."""
    out_5T = _launch_forward(logits_TV, targets_T, vocab_size, vocab_offset, temperature, is_whole=True)
    logprobs_T, entropy_T, *distribution = out_5T.unbind(0)
    return logprobs_T, entropy_T, RowDistribution(*distribution)


def _launch_statistics(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, vocab_size: int, vocab_offset: int, temperature: float
) -> SoftmaxStatistics:
    if logits_TV.shape[1] == 0:
        return SoftmaxStatistics.empty(logits_TV.shape[0], logits_TV.new_empty(0, dtype=torch.float32))
    out_5T = _launch_forward(logits_TV, targets_T, vocab_size, vocab_offset, temperature, is_whole=False)
    return SoftmaxStatistics(*out_5T[:4].unbind(0))


def _launch_forward(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    vocab_size: int,
    vocab_offset: int,
    temperature: float,
    *,
    is_whole: bool,
) -> torch.Tensor:
    num_rows, num_columns = logits_TV.shape
    out_5T = logits_TV.new_empty(5, num_rows, dtype=torch.float32)
    if num_rows > 0:
        _logprob_fwd_kernel[(num_rows,)](
            logits_TV,
            targets_T.contiguous(),
            out_5T,
            num_rows,
            num_columns,
            logits_TV.stride(0),
            vocab_size,
            vocab_offset,
            temperature,
            IGNORE=IGNORE_INDEX,
            IS_WHOLE=is_whole,
            BLOCK=BLOCK_COLUMNS,
            num_warps=8,
        )
    return out_5T


def _launch_gradient(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
    *,
    vocab_offset: int,
    temperature: float,
    out_TV: torch.Tensor,
) -> None:
    num_rows, num_columns = logits_TV.shape
    if num_rows == 0 or num_columns == 0:
        return
    unused_T = distribution.max_T
    _logprob_bwd_kernel[(num_rows, triton.cdiv(num_columns, BLOCK_COLUMNS))](
        logits_TV,
        out_TV,
        targets_T.contiguous(),
        *distribution,
        unused_T if dlogprob_T is None else dlogprob_T.contiguous(),
        unused_T if dentropy_T is None else dentropy_T.contiguous(),
        num_columns,
        logits_TV.stride(0),
        out_TV.stride(0),
        vocab_offset,
        temperature,
        IGNORE=IGNORE_INDEX,
        HAS_LOGPROB=dlogprob_T is not None,
        HAS_ENTROPY=dentropy_T is not None,
        BLOCK=BLOCK_COLUMNS,
        num_warps=8,
    )


def compile_cases() -> list[CompileCase]:
    """Return both kernels in bf16; 6B and 9B differ only in runtime arguments and share their binaries."""
    rows = ("maximum_ptr", "log_sum_ptr", "entropy_ptr", "dlogprob_ptr", "dentropy_ptr")
    integers = ("num_rows", "num_columns", "stride", "out_stride", "vocab_size", "vocab_offset")
    kinds = {
        "logits_ptr": "*bf16",
        "targets_ptr": "*i64",
        "temperature": "fp32",
        **dict.fromkeys(rows, "*fp32"),
        **dict.fromkeys(integers, "i32"),
    }
    cases = []
    for name, kernel, out, options in (
        ("logprob_fwd", _logprob_fwd_kernel, "*fp32", {"IS_WHOLE": True}),
        ("logprob_bwd", _logprob_bwd_kernel, "*bf16", {"HAS_LOGPROB": True, "HAS_ENTROPY": True}),
    ):
        constexprs = options | {"IGNORE": IGNORE_INDEX, "BLOCK": BLOCK_COLUMNS}
        every = kinds | {"out_ptr": out} | dict.fromkeys(constexprs, "constexpr")
        signature = {argument: every[argument] for argument in kernel.arg_names}
        cases.append(
            CompileCase(
                name=f"{name}/6B,9B/bf16",
                kernel=kernel,
                signature=signature,
                constexprs=constexprs,
                divisible_by_16=tuple(
                    argument for argument in signature if argument.endswith(("_ptr", "stride"))
                ),
                num_warps=8,
            )
        )
    return cases
