"""Partial interleaved rotary position embedding of GLM for queries and keys."""

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.dispatch.launch import CompileCase
from glm_rlhf.kernels.layers import reference_rope as reference

# Tokens and heads per program: at 32 pairs per head this is 32 bf16 elements per thread, four 16-byte loads,
# and the angles are read once per eight heads. 34 rotated heads (6B) fill 85 % of five such blocks.
_BLOCK_T = 8
_BLOCK_N = 8


def rope_table(
    num_positions: int, rotary_size: int, theta: float, *, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos_PR, sin_PR) of every position and pair: fp32 [num_positions, rotary_size / 2].

    angle[p, i] = p · theta^(−2i / rotary_size)

    Index it by position for `rope`: `cos_PR[positions_T]`.

    Args:
        num_positions: positions 0 to num_positions − 1.
        rotary_size: rotated elements of a head, even.
        theta: base of the frequencies (`rope_theta` times any `rope_ratio`).
        device: of the table.

    Raises:
        ValueError: rotary_size is odd.

    Source: Su et al., "RoFormer" (2021), eq. 15; the frequencies are rounded as in transformers' GLM.
    """
    if rotary_size % 2:
        raise ValueError(f"rotary_size is {rotary_size}: rotation acts on pairs, so it must be even")
    exponents_R = torch.arange(0, rotary_size, 2, dtype=torch.float32, device=device) / rotary_size
    positions_P = torch.arange(num_positions, dtype=torch.float32, device=device)
    angle_PR = torch.outer(positions_P, 1.0 / theta**exponents_R)
    return angle_PR.cos(), angle_PR.sin()


def rope(heads_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Return heads with their first 2R elements rotated by pairs, the rest copied.

    out[t, n, 2i]     = in[t, n, 2i] · cos[t, i] − in[t, n, 2i + 1] · sin[t, i]
    out[t, n, 2i + 1] = in[t, n, 2i + 1] · cos[t, i] + in[t, n, 2i] · sin[t, i],  i < R

    Args:
        heads_TNH: [T, N, H], fp32, bf16 or fp16 (fp64 on CPU); computed in fp32, rounded once.
        cos_TR: fp32 [T, R], 2R ≤ H, cosines at each token's position; a constant without gradient.
        sin_TR: fp32 [T, R], sines.

    Returns:
        [T, N, H] in heads' dtype, new memory; differentiable in heads. The gradient is rotated back.

    Raises:
        ValueError: shapes do not fit, or the kernel gets float64.

    Source: transformers' `apply_rotary_pos_emb` of GLM, which rounds cos, sin and each product to bf16.
    """
    num_heads, head_size = heads_TNH.shape[1:]
    return _rope(heads_TNH, cos_TR, sin_TR, (1, num_heads, head_size), num_heads, is_in_place=False)


def rope_qkv(mixed_TGQH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Return packed queries, keys and values with queries and keys rotated, in new memory.

    Args:
        mixed_TGQH: [T, groups, queries per group + 2, H]; a group holds its query heads, its key head, its
            value head, in this order.
        cos_TR, sin_TR: as in `rope`.

    Returns:
        The same layout; the last head of each group is copied. Differentiable in mixed.

    Raises:
        ValueError: as `rope`.
    """
    shape = tuple(mixed_TGQH.shape[1:])
    return _rope(mixed_TGQH, cos_TR, sin_TR, shape, shape[1] - 1, is_in_place=False)


def rope_qkv_in_place(
    mixed_TM: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    *,
    num_groups: int,
    head_size: int,
) -> torch.Tensor:
    """Rotate queries and keys inside the projection's own output and return that tensor.

    The backward also rotates the incoming gradient in place, so the result must not share its gradient with
    another branch: pass it to views and attention only, not to an addition.

    Args:
        mixed_TM: contiguous [T, groups · (queries per group + 2) · H], laid out as for `rope_qkv`. It is
            overwritten. Pass the linear layer's output itself: for a view, autograd would copy the gradient.
        cos_TR, sin_TR: as in `rope`.
        num_groups: key/value heads on this rank.
        head_size: H.

    Returns:
        `mixed_TM`, rotated.

    Raises:
        ValueError: as `rope`, or mixed is not contiguous, or not a whole number of groups.
    """
    if mixed_TM.ndim != 2 or mixed_TM.shape[1] % (num_groups * head_size) or not mixed_TM.is_contiguous():
        raise ValueError(
            f"mixed is {tuple(mixed_TM.shape)} with strides {mixed_TM.stride()}: rotating in place needs a "
            f"contiguous [T, {num_groups} groups · heads · {head_size}]"
        )
    heads_per_group = mixed_TM.shape[1] // (num_groups * head_size)
    shape = (num_groups, heads_per_group, head_size)
    return _rope(mixed_TM, cos_TR, sin_TR, shape, heads_per_group - 1, is_in_place=True)


def _rope(
    heads: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    group_shape: tuple[int, int, int],
    num_rotated: int,
    *,
    is_in_place: bool,
) -> torch.Tensor:
    num_tokens = heads.shape[0]
    if cos_TR.shape != sin_TR.shape or cos_TR.ndim != 2 or cos_TR.shape[0] != num_tokens:
        raise ValueError(
            f"cos is {tuple(cos_TR.shape)}, sin {tuple(sin_TR.shape)}: both must be [{num_tokens}, pairs], "
            "one row per token; gather the table's rows by position"
        )
    if 2 * cos_TR.shape[1] > group_shape[2]:
        raise ValueError(f"{cos_TR.shape[1]} pairs do not fit a head of {group_shape[2]} elements")
    if torch.is_grad_enabled() and heads.requires_grad:
        return _Rope.apply(heads, cos_TR, sin_TR, group_shape, num_rotated, is_in_place)
    out = heads if is_in_place else heads.clone(memory_format=torch.contiguous_format)
    _rotate(out, cos_TR, sin_TR, group_shape, num_rotated)
    return out


class _Rope(torch.autograd.Function):
    """A rotation: linear and orthogonal, so that backward needs only the angles."""

    @staticmethod
    def forward(ctx, heads, cos_TR, sin_TR, group_shape, num_rotated, is_in_place):
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.group_shape, ctx.num_rotated, ctx.is_in_place = group_shape, num_rotated, is_in_place
        if is_in_place:
            ctx.mark_dirty(heads)
            out = heads
        else:
            out = heads.clone(memory_format=torch.contiguous_format)
        _rotate(out, cos_TR, sin_TR, group_shape, num_rotated)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos_TR, sin_TR = ctx.saved_tensors
        if not (ctx.is_in_place and grad.is_contiguous()):
            grad = grad.clone(memory_format=torch.contiguous_format)
        _rotate(grad, cos_TR, -sin_TR, ctx.group_shape, ctx.num_rotated)
        return grad, None, None, None, None, None


def _rotate(
    heads: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    group_shape: tuple[int, int, int],
    num_rotated: int,
) -> None:
    """Rotate the first `num_rotated` heads of each group of contiguous `heads` in place."""
    num_groups, heads_per_group, head_size = group_shape
    num_tokens, num_pairs = cos_TR.shape
    total_rotated = num_groups * num_rotated
    if num_tokens * total_rotated * num_pairs == 0:
        return
    heads_TGSH = heads.view(num_tokens, num_groups, heads_per_group, head_size)
    if not launch.uses_triton(heads):
        reference.rotate_in_place(heads_TGSH[:, :, :num_rotated], cos_TR, sin_TR)
        return
    if heads.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernel computes in fp32, heads are {heads.dtype}: pass fp32, bf16 or fp16")
    grid = (triton.cdiv(num_tokens, _BLOCK_T), triton.cdiv(total_rotated, _BLOCK_N))
    _rope_kernel[grid](
        heads_TGSH,
        cos_TR.contiguous(),
        sin_TR.contiguous(),
        num_tokens,
        TOTAL_ROTATED=total_rotated,
        NUM_ROTATED=num_rotated,
        HEADS_PER_GROUP=heads_per_group,
        TOKEN_STRIDE=num_groups * heads_per_group * head_size,
        H=head_size,
        R=num_pairs,
        BLOCK_T=_BLOCK_T,
        BLOCK_N=_BLOCK_N,
        BLOCK_R=triton.next_power_of_2(num_pairs),
        num_warps=4,
    )


@triton.jit
def _rope_kernel(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    num_tokens,
    TOTAL_ROTATED: tl.constexpr,
    NUM_ROTATED: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rotated = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rotated head r is in group r // NUM_ROTATED; the group's unrotated heads are skipped.
    heads = rotated // NUM_ROTATED * HEADS_PER_GROUP + rotated % NUM_ROTATED
    elements = tl.arange(0, 2 * BLOCK_R)
    pairs = tl.arange(0, BLOCK_R)

    is_row = (tokens < num_tokens)[:, None] & (rotated < TOTAL_ROTATED)[None, :]
    mask = is_row[:, :, None] & (elements < 2 * R)[None, None, :]
    pointers = heads_ptr + tokens[:, None, None] * TOKEN_STRIDE
    pointers += heads[None, :, None] * H + elements[None, None, :]
    stored = tl.load(pointers, mask=mask, other=0.0)
    even, odd = tl.split(stored.to(tl.float32).reshape(BLOCK_T, BLOCK_N, BLOCK_R, 2))

    angle_offsets = tokens[:, None, None] * R + pairs[None, None, :]
    angle_mask = (tokens < num_tokens)[:, None, None] & (pairs < R)[None, None, :]
    cos = tl.load(cos_ptr + angle_offsets, mask=angle_mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle_offsets, mask=angle_mask, other=0.0).to(tl.float32)
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    turned = turned.reshape(BLOCK_T, BLOCK_N, 2 * BLOCK_R)
    tl.store(pointers, turned.to(stored.dtype), mask=mask)


def compile_cases() -> list[CompileCase]:
    """Return the rotation of packed QKV at 6B/9B (32 query heads, 2 groups) whole and at tp 2, in bf16."""
    cases = []
    for name, num_groups in (("6B", 2), ("6B-tp2", 1)):
        constexprs = {
            "TOTAL_ROTATED": 17 * num_groups,
            "NUM_ROTATED": 17,
            "HEADS_PER_GROUP": 18,
            "TOKEN_STRIDE": 18 * 128 * num_groups,
            "H": 128,
            "R": 32,
            "BLOCK_T": _BLOCK_T,
            "BLOCK_N": _BLOCK_N,
            "BLOCK_R": 32,
        }
        signature = {"heads_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "num_tokens": "i32"}
        cases.append(
            CompileCase(
                name=f"rope/{name}/bf16",
                kernel=_rope_kernel,
                signature=signature | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible_by_16=("heads_ptr", "cos_ptr", "sin_ptr"),
                num_warps=4,
            )
        )
    return cases
