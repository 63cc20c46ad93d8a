"""PPO's clipped policy loss, its gradient and its statistics in one launch."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from glm_rlhf.kernels.dispatch.arguments import check_denominator, check_mask, check_range, check_vectors
from glm_rlhf.kernels.dispatch.launch import CompileCase, uses_triton
from glm_rlhf.kernels.rl import reference_policy_loss as reference
from glm_rlhf.kernels.rl.kl import token_kl, token_kl_slope
from glm_rlhf.kernels.rl.reference_kl import check_kl_estimator
from glm_rlhf.kernels.rl.reference_policy_loss import POLICY_SUMS, PolicyStatistics

# 4 tokens per thread at 4 warps: one 16-byte vector of each argument; 8 tokens per thread spill on sm_100.
BLOCK_TOKENS = 512


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
    """Return (loss, statistics) of PPO's clipped surrogate; differentiable in logprobs and entropy.

    With ρ_t = exp(logprobs_T[t] - old_logprobs_T[t]), over the tokens t where mask_T is true:

        L_t  = max(-A_t ρ_t, -A_t clip(ρ_t, 1 - clip_low, 1 + clip_high))
        L_t  = min(L_t, -A_t dual_clip)                      where A_t < 0, if dual_clip is given
        d_t  = logprobs_T[t] - ref_logprobs_T[t]
        loss = Σ_t [ w_t L_t - entropy_coef H_t + kl_coef kl(d_t) ] / denominator

    The gradient with respect to logprobs has a closed form, -w_t A_t ρ_t for unclipped tokens and 0 for
    clipped ones (a ratio exactly on the bound is unclipped), plus the slope of the KL term. The forward
    launch computes it with the loss, backward scales it. A small reduction after the launch adds the
    per-block partial sums in a fixed order, so that results are deterministic.

    Args:
        logprobs_T: [T] float, log p(token t | tokens before t) of the policy in training, nats.
        old_logprobs_T: [T] float, the same under the policy of the advantages. A constant.
        advantages_T: [T] float. A constant.
        mask_T: [T] bool, True = trained on. The other arguments are not read where it is False.
        clip_low: lower bound of the ratio is 1 - clip_low; in [0, 1].
        clip_high: upper bound of the ratio is 1 + clip_high; ≥ 0.
        dual_clip: > 1, or None for no bound on the loss with negative advantages.
        entropy_T: [T] float, entropy of the policy at each token, nats. Required if entropy_coef ≠ 0.
        entropy_coef: weight of the entropy bonus.
        ref_logprobs_T: [T] float, logprobs of the reference. A constant; required if kl_coef ≠ 0.
        kl_coef: weight of the KL penalty inside the loss.
        kl_estimator: `k1`, `k2` or `k3`. As a loss only k2 and k3 make sense: the gradient of k1 has
            expectation zero.
        importance_weights_T: [T] float, w_t, e.g. training over rollout probability, truncated. A constant.
        denominator: divides the sum: the number of trained tokens over all micro-batches and data-parallel
            ranks, for a mean over global tokens. The host does not wait for a tensor.

    Returns:
        loss: 0-dim fp32 (fp64 on the reference path if logprobs are fp64).
        PolicyStatistics: sums and extremes over the trained tokens, not differentiable.

    Raises:
        ValueError: shapes, devices, ranges or combinations do not fit.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv 1912.09729),
    eq. 5; separate bounds: Yu et al. 2025 (arXiv 2503.14476).
    """
    num_tokens = logprobs_T.numel()
    check_vectors(
        logprobs_T=(logprobs_T, num_tokens),
        old_logprobs_T=(old_logprobs_T, num_tokens),
        advantages_T=(advantages_T, num_tokens),
        mask_T=(mask_T, num_tokens),
        entropy_T=(entropy_T, num_tokens),
        ref_logprobs_T=(ref_logprobs_T, num_tokens),
        importance_weights_T=(importance_weights_T, num_tokens),
    )
    check_mask("mask_T", mask_T)
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0, float("inf"))
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip is {dual_clip}, required is a number above 1, or None")
    if entropy_coef != 0.0 and entropy_T is None:
        raise ValueError(f"entropy_coef is {entropy_coef}, which needs entropy_T")
    if kl_coef != 0.0 and ref_logprobs_T is None:
        raise ValueError(f"kl_coef is {kl_coef}, which needs ref_logprobs_T")
    check_kl_estimator(kl_estimator)
    check_denominator(denominator)
    if not uses_triton(logprobs_T):
        return reference.ppo_policy_loss(
            logprobs_T,
            old_logprobs_T,
            advantages_T,
            mask_T,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            entropy_T=entropy_T,
            entropy_coef=entropy_coef,
            ref_logprobs_T=ref_logprobs_T,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            importance_weights_T=importance_weights_T,
            denominator=denominator,
        )
    objective, sums, maxima = _PolicyObjective.apply(
        logprobs_T,
        entropy_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        ref_logprobs_T,
        importance_weights_T,
        _Settings(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator),
    )
    return objective / denominator, PolicyStatistics(sums=sums, maxima=maxima)


class _Settings(NamedTuple):
    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float
    kl_coef: float
    kl_estimator: str


class _PolicyObjective(torch.autograd.Function):
    """The sum over tokens, before the denominator; forward computes its gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logprobs_T: torch.Tensor,
        entropy_T: torch.Tensor | None,
        old_logprobs_T: torch.Tensor,
        advantages_T: torch.Tensor,
        mask_T: torch.Tensor,
        ref_logprobs_T: torch.Tensor | None,
        weights_T: torch.Tensor | None,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slope_T, sums, maxima = _launch(
            logprobs_T, entropy_T, old_logprobs_T, advantages_T, mask_T, ref_logprobs_T, weights_T, settings
        )
        ctx.save_for_backward(slope_T, mask_T)
        ctx.logprobs_dtype = logprobs_T.dtype
        ctx.entropy_dtype = None if entropy_T is None else entropy_T.dtype
        ctx.entropy_coef = settings.entropy_coef
        ctx.mark_non_differentiable(sums, maxima)
        return sums[POLICY_SUMS.index("objective")].clone(), sums, maxima

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_objective: torch.Tensor, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        slope_T, mask_T = ctx.saved_tensors
        grad_logprobs_T = grad_entropy_T = None
        if ctx.needs_input_grad[0]:
            grad_logprobs_T = (slope_T * grad_objective).to(ctx.logprobs_dtype)
        if ctx.needs_input_grad[1]:
            grad_entropy_T = (mask_T * (-ctx.entropy_coef * grad_objective)).to(ctx.entropy_dtype)
        return grad_logprobs_T, grad_entropy_T, None, None, None, None, None, None


def _launch(
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor | None,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    ref_logprobs_T: torch.Tensor | None,
    weights_T: torch.Tensor | None,
    settings: _Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, device = logprobs_T.numel(), logprobs_T.device
    # At least one program, so that zero tokens give zeros and not uninitialised memory.
    num_blocks = max(triton.cdiv(num_tokens, BLOCK_TOKENS), 1)
    slope_T = torch.empty(num_tokens, dtype=torch.float32, device=device)
    sums_PS = torch.empty(num_blocks, len(POLICY_SUMS), dtype=torch.float32, device=device)
    maxima_P2 = torch.empty(num_blocks, 2, dtype=torch.float32, device=device)
    logprobs_T = logprobs_T.contiguous()
    _policy_loss_fwd_kernel[(num_blocks,)](
        logprobs_T,
        old_logprobs_T.contiguous(),
        advantages_T.contiguous(),
        mask_T.contiguous().view(torch.uint8),
        logprobs_T if entropy_T is None else entropy_T.contiguous(),
        logprobs_T if ref_logprobs_T is None else ref_logprobs_T.contiguous(),
        logprobs_T if weights_T is None else weights_T.contiguous(),
        slope_T,
        sums_PS,
        maxima_P2,
        num_tokens,
        1.0 - settings.clip_low,
        1.0 + settings.clip_high,
        float("inf") if settings.dual_clip is None else float(settings.dual_clip),
        float(settings.entropy_coef),
        float(settings.kl_coef),
        HAS_ENTROPY=entropy_T is not None,
        HAS_REFERENCE=ref_logprobs_T is not None,
        HAS_WEIGHTS=weights_T is not None,
        HAS_DUAL_CLIP=settings.dual_clip is not None,
        KL_ESTIMATOR=settings.kl_estimator,
        NUM_SUMS=len(POLICY_SUMS),
        BLOCK=BLOCK_TOKENS,
        num_warps=4,
    )
    return slope_T, sums_PS.sum(0), maxima_P2.amax(0)


@triton.jit
def _clipped_surrogate(log_ratio, advantage, ratio_low, ratio_high, dual_clip, HAS_DUAL_CLIP: tl.constexpr):
    """Return (L_t, dL_t / dlogprob, ratio, is_clipped, is_dual_clipped) of tokens, fp32."""
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    bound = -advantage * tl.minimum(tl.maximum(ratio, ratio_low), ratio_high)
    # NaN compares false: it stays in the unclipped branch and is propagated.
    is_clipped = bound > unclipped
    loss = tl.where(is_clipped, bound, unclipped)
    is_dual_clipped = tl.zeros_like(is_clipped)
    if HAS_DUAL_CLIP:
        is_dual_clipped = (advantage < 0.0) & (loss > -advantage * dual_clip)
        loss = tl.where(is_dual_clipped, -advantage * dual_clip, loss)
    slope = tl.where(is_clipped | is_dual_clipped, 0.0, unclipped)
    return loss, slope, ratio, is_clipped, is_dual_clipped


@triton.jit
def _policy_loss_fwd_kernel(
    logprobs_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    entropy_ptr,
    ref_logprobs_ptr,
    weights_ptr,
    slope_ptr,
    sums_ptr,
    maxima_ptr,
    num_tokens,
    ratio_low,
    ratio_high,
    dual_clip,
    entropy_coef,
    kl_coef,
    HAS_ENTROPY: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of tokens writes their slopes and one row of partial sums and maxima."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_inside = token < num_tokens
    is_trained = tl.load(mask_ptr + token, mask=is_inside, other=0) != 0
    logprob = tl.load(logprobs_ptr + token, mask=is_trained, other=0.0).to(tl.float32)
    old_logprob = tl.load(old_logprobs_ptr + token, mask=is_trained, other=0.0).to(tl.float32)
    advantage = tl.load(advantages_ptr + token, mask=is_trained, other=0.0).to(tl.float32)

    log_ratio = logprob - old_logprob
    loss, slope, ratio, is_clipped, is_dual_clipped = _clipped_surrogate(
        log_ratio, advantage, ratio_low, ratio_high, dual_clip, HAS_DUAL_CLIP
    )
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + token, mask=is_trained, other=0.0).to(tl.float32)
        loss *= weight
        slope *= weight
    objective = loss
    entropy = tl.zeros_like(loss)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + token, mask=is_trained, other=0.0).to(tl.float32)
        if entropy_coef != 0.0:  # an entropy that is only a statistic must not turn the loss into NaN
            objective -= entropy_coef * entropy
    kl = tl.zeros_like(loss)
    if HAS_REFERENCE:
        ref_logprob = tl.load(ref_logprobs_ptr + token, mask=is_trained, other=0.0).to(tl.float32)
        kl = token_kl(logprob - ref_logprob, KL_ESTIMATOR)
        if kl_coef != 0.0:
            objective += kl_coef * kl
            slope += kl_coef * token_kl_slope(logprob - ref_logprob, KL_ESTIMATOR)
    tl.store(slope_ptr + token, tl.where(is_trained, slope, 0.0), mask=is_inside)

    infinity = float("inf")
    is_finite = (tl.abs(log_ratio) < infinity) & (tl.abs(objective) < infinity) & (tl.abs(slope) < infinity)
    # In the order of POLICY_SUMS. Untrained tokens were loaded as zeros: all their terms but the ratio are 0.
    row = sums_ptr + block * NUM_SUMS
    tl.store(row, tl.sum(objective))
    tl.store(row + 1, tl.sum(is_trained.to(tl.float32)))
    tl.store(row + 2, tl.sum(loss))
    tl.store(row + 3, tl.sum(entropy))
    tl.store(row + 4, tl.sum(kl))
    tl.store(row + 5, tl.sum(is_clipped.to(tl.float32)))
    tl.store(row + 6, tl.sum(is_dual_clipped.to(tl.float32)))
    tl.store(row + 7, tl.sum(-log_ratio))
    tl.store(row + 8, tl.sum(token_kl(-log_ratio, "k3")))
    tl.store(row + 9, tl.sum(tl.where(is_trained, ratio, 0.0)))
    tl.store(row + 10, tl.sum((is_trained & ~is_finite).to(tl.float32)))
    tl.store(maxima_ptr + block * 2, tl.max(tl.where(is_trained, ratio, -infinity)))
    tl.store(maxima_ptr + block * 2 + 1, tl.max(tl.where(is_trained, -ratio, -infinity)))


def compile_cases() -> list[CompileCase]:
    """Return the kernel with every option on; it does not depend on model shapes."""
    inputs = ("logprobs_ptr", "old_logprobs_ptr", "advantages_ptr", "entropy_ptr", "ref_logprobs_ptr")
    pointers = dict.fromkeys((*inputs, "weights_ptr", "slope_ptr", "sums_ptr", "maxima_ptr"), "*fp32")
    pointers |= {"mask_ptr": "*u8"}
    scalars = dict.fromkeys(("ratio_low", "ratio_high", "dual_clip", "entropy_coef", "kl_coef"), "fp32")
    options = ("HAS_ENTROPY", "HAS_REFERENCE", "HAS_WEIGHTS", "HAS_DUAL_CLIP")
    constexprs = dict.fromkeys(options, True) | {
        "KL_ESTIMATOR": "k3",
        "NUM_SUMS": len(POLICY_SUMS),
        "BLOCK": BLOCK_TOKENS,
    }
    return [
        CompileCase(
            name="ppo_policy_loss_fwd/T8192/fp32",
            kernel=_policy_loss_fwd_kernel,
            signature=pointers | {"num_tokens": "i32"} | scalars | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            divisible_by_16=(*pointers, "num_tokens"),
            num_warps=4,
        )
    ]
