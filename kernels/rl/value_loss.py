"""PPO's clipped value loss, its gradient and its statistics in one launch."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from glm_rlhf.kernels.dispatch.arguments import check_denominator, check_mask, check_vectors
from glm_rlhf.kernels.dispatch.launch import CompileCase, uses_triton
from glm_rlhf.kernels.rl import reference_value_loss as reference
from glm_rlhf.kernels.rl.reference_value_loss import VALUE_SUMS, ValueStatistics

# 4 tokens per thread at 4 warps: one 16-byte vector of each argument.
BLOCK_TOKENS = 512


def ppo_value_loss(
    values_T: torch.Tensor,
    old_values_T: torch.Tensor | None,
    returns_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    value_clip: float | None = None,
    denominator: float | torch.Tensor,
) -> tuple[torch.Tensor, ValueStatistics]:
    """Return (loss, statistics) of PPO's value loss; differentiable in values.

    Over the tokens t where mask_T is true, with V'_t = clip(V_t, old_t - value_clip, old_t + value_clip):

        L_t  = ½ max((V_t - R_t)², (V'_t - R_t)²)            or ½ (V_t - R_t)² without value_clip
        loss = Σ_t L_t / denominator

    The gradient is V_t - R_t, and 0 where the clipped error is the larger one. The forward launch computes it
    with the loss, backward scales it. A small reduction after the launch adds the per-block partial sums in a
    fixed order, so that results are deterministic.

    Args:
        values_T: [T] float, the critic's values, aligned with logprobs as in `ppo_advantages`.
        old_values_T: [T] float, values at the time of the rollout, a constant. None without clipping.
        returns_T: [T] float, A_t + V_t from `ppo_advantages`. A constant.
        mask_T: [T] bool, True = trained on. The other arguments are not read where it is False.
        value_clip: > 0, in units of value, or None.
        denominator: divides the sum: the number of trained tokens over all micro-batches and data-parallel
            ranks, for a mean over global tokens. The host does not wait for a tensor.

    Returns:
        loss: 0-dim fp32 (fp64 on the reference path if values are fp64).
        ValueStatistics: sums over the trained tokens, not differentiable.

    Raises:
        ValueError: shapes, devices, ranges or combinations do not fit.

    Source: the value clipping of OpenAI baselines' PPO2; the factor ½ as in TRL and verl.
    """
    num_tokens = values_T.numel()
    check_vectors(
        values_T=(values_T, num_tokens),
        old_values_T=(old_values_T, num_tokens),
        returns_T=(returns_T, num_tokens),
        mask_T=(mask_T, num_tokens),
    )
    check_mask("mask_T", mask_T)
    if value_clip is not None:
        if not value_clip > 0.0:
            raise ValueError(f"value_clip is {value_clip}, required is a positive number, or None")
        if old_values_T is None:
            raise ValueError(f"value_clip is {value_clip}, which needs old_values_T")
    check_denominator(denominator)
    if not uses_triton(values_T):
        return reference.ppo_value_loss(
            values_T, old_values_T, returns_T, mask_T, value_clip=value_clip, denominator=denominator
        )
    objective, sums = _ValueObjective.apply(values_T, old_values_T, returns_T, mask_T, value_clip)
    return objective / denominator, ValueStatistics(sums=sums)


class _ValueObjective(torch.autograd.Function):
    """The sum over tokens, before the denominator; forward computes its gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values_T: torch.Tensor,
        old_values_T: torch.Tensor | None,
        returns_T: torch.Tensor,
        mask_T: torch.Tensor,
        value_clip: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slope_T, sums = _launch(values_T, old_values_T, returns_T, mask_T, value_clip)
        ctx.save_for_backward(slope_T)
        ctx.values_dtype = values_T.dtype
        ctx.mark_non_differentiable(sums)
        return sums[VALUE_SUMS.index("objective")].clone(), sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_objective: torch.Tensor, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        (slope_T,) = ctx.saved_tensors
        return (slope_T * grad_objective).to(ctx.values_dtype), None, None, None, None


def _launch(
    values_T: torch.Tensor,
    old_values_T: torch.Tensor | None,
    returns_T: torch.Tensor,
    mask_T: torch.Tensor,
    value_clip: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, device = values_T.numel(), values_T.device
    # At least one program, so that zero tokens give zeros and not uninitialised memory.
    num_blocks = max(triton.cdiv(num_tokens, BLOCK_TOKENS), 1)
    slope_T = torch.empty(num_tokens, dtype=torch.float32, device=device)
    sums_PS = torch.empty(num_blocks, len(VALUE_SUMS), dtype=torch.float32, device=device)
    values_T = values_T.contiguous()
    _value_loss_fwd_kernel[(num_blocks,)](
        values_T,
        values_T if old_values_T is None else old_values_T.contiguous(),
        returns_T.contiguous(),
        mask_T.contiguous().view(torch.uint8),
        slope_T,
        sums_PS,
        num_tokens,
        0.0 if value_clip is None else float(value_clip),
        HAS_CLIP=value_clip is not None,
        NUM_SUMS=len(VALUE_SUMS),
        BLOCK=BLOCK_TOKENS,
        num_warps=4,
    )
    return slope_T, sums_PS.sum(0)


@triton.jit
def _value_loss_fwd_kernel(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,
    slope_ptr,
    sums_ptr,
    num_tokens,
    value_clip,
    HAS_CLIP: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of tokens writes their slopes and one row of partial sums."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_inside = token < num_tokens
    is_trained = tl.load(mask_ptr + token, mask=is_inside, other=0) != 0
    value = tl.load(values_ptr + token, mask=is_trained, other=0.0).to(tl.float32)
    returned = tl.load(returns_ptr + token, mask=is_trained, other=0.0).to(tl.float32)

    error = returned - value
    loss = 0.5 * error * error
    slope = -error
    is_clipped = tl.zeros_like(is_trained)
    if HAS_CLIP:
        old_value = tl.load(old_values_ptr + token, mask=is_trained, other=0.0).to(tl.float32)
        near = tl.maximum(value, old_value - value_clip, propagate_nan=tl.PropagateNan.ALL)
        near = tl.minimum(near, old_value + value_clip, propagate_nan=tl.PropagateNan.ALL)
        clipped = 0.5 * (near - returned) * (near - returned)
        # Strictly larger implies out of range, where the clipped branch is constant. NaN counts as clipped.
        is_clipped = is_trained & ~(clipped <= loss)
        loss = tl.where(is_clipped, clipped, loss)
        slope = tl.where(is_clipped, 0.0, slope)
    tl.store(slope_ptr + token, slope, mask=is_inside)

    is_finite = (tl.abs(loss) < float("inf")) & (tl.abs(slope) < float("inf"))
    # In the order of VALUE_SUMS. Untrained tokens were loaded as zeros and add nothing.
    row = sums_ptr + block * NUM_SUMS
    tl.store(row, tl.sum(loss))
    tl.store(row + 1, tl.sum(is_trained.to(tl.float32)))
    tl.store(row + 2, tl.sum(is_clipped.to(tl.float32)))
    tl.store(row + 3, tl.sum(value))
    tl.store(row + 4, tl.sum(returned))
    tl.store(row + 5, tl.sum(returned * returned))
    tl.store(row + 6, tl.sum(error))
    tl.store(row + 7, tl.sum(error * error))
    tl.store(row + 8, tl.sum((~is_finite).to(tl.float32)))


def compile_cases() -> list[CompileCase]:
    """Return the kernel with clipping; it does not depend on model shapes."""
    names = ("values_ptr", "old_values_ptr", "returns_ptr", "slope_ptr", "sums_ptr")
    pointers = dict.fromkeys(names, "*fp32") | {"mask_ptr": "*u8"}
    constexprs = {"HAS_CLIP": True, "NUM_SUMS": len(VALUE_SUMS), "BLOCK": BLOCK_TOKENS}
    scalars = {"num_tokens": "i32", "value_clip": "fp32"}
    return [
        CompileCase(
            name="ppo_value_loss_fwd/T8192/fp32",
            kernel=_value_loss_fwd_kernel,
            signature=pointers | scalars | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            divisible_by_16=(*pointers, "num_tokens"),
            num_warps=4,
        )
    ]
