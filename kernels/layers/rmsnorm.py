"""RMSNorm, alone or fused with the residual addition before it."""

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.dispatch.launch import CompileCase
from glm_rlhf.kernels.layers import reference_rmsnorm as reference

# Elements per program: 16 per thread with 8 warps, two 16-byte bf16 loads in flight each.
_TILE_ELEMENTS = 4096
# Programs of the backward, each with its own row of d_weight: two blocks per multiprocessor of an H100 (132).
# A constant, so that the order of summation does not depend on the device.
_BACKWARD_PROGRAMS = 264


def rms_norm(hidden_TD: torch.Tensor, weight_D: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """Return hidden divided by its root mean square and scaled, in hidden's dtype.

    normed[t, d] = round(hidden[t, d] / sqrt(mean_e hidden[t, e]² + epsilon)) · weight[d]

    The statistics are fp32; `round` is the cast to hidden's dtype before the weight, as in transformers'
    GlmRMSNorm, so that bf16 models agree with it bitwise except for the order of the sum.

    Args:
        hidden_TD: [..., D], fp32, bf16 or fp16 (fp64 on CPU).
        weight_D: [D], any of these dtypes.
        epsilon: added to the mean square, > 0.

    Returns:
        [..., D], hidden's dtype; differentiable in hidden and weight (once).

    Raises:
        ValueError: weight is not [D], or the kernel gets float64.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4.
    """
    _check(hidden_TD, weight_D)
    flat_TD = hidden_TD.reshape(-1, hidden_TD.shape[-1])
    if _needs_grad(hidden_TD, weight_D):
        normed_TD = _RMSNorm.apply(flat_TD, None, weight_D, epsilon)
    else:
        normed_TD, _, _ = _forward(flat_TD, None, weight_D, epsilon)
    return normed_TD.view(hidden_TD.shape)


def add_rms_norm(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(total_TD), total_TD) with total = hidden + residual, rounded to hidden's dtype.

    Args:
        hidden_TD: [..., D], fp32, bf16 or fp16 (fp64 on CPU): the output of a sublayer.
        residual_TD: the residual stream, shape and dtype of hidden.
        weight_D: [D].
        epsilon: added to the mean square, > 0.

    Returns:
        The normalised sum and the sum, both [..., D] in hidden's dtype; differentiable in all three tensors.

    Raises:
        ValueError: shapes or dtypes do not fit, or the kernel gets float64.

    Source: as `rms_norm`.
    """
    _check(hidden_TD, weight_D)
    if residual_TD.shape != hidden_TD.shape or residual_TD.dtype != hidden_TD.dtype:
        raise ValueError(
            f"residual is {tuple(residual_TD.shape)} {residual_TD.dtype}, hidden is {tuple(hidden_TD.shape)} "
            f"{hidden_TD.dtype}: both must have the same shape and dtype"
        )
    flat_TD = hidden_TD.reshape(-1, hidden_TD.shape[-1])
    flat_residual_TD = residual_TD.reshape(flat_TD.shape)
    if _needs_grad(hidden_TD, residual_TD, weight_D):
        normed_TD, total_TD = _RMSNorm.apply(flat_TD, flat_residual_TD, weight_D, epsilon)
    else:
        normed_TD, total_TD, _ = _forward(flat_TD, flat_residual_TD, weight_D, epsilon)
    return normed_TD.view(hidden_TD.shape), total_TD.view(hidden_TD.shape)


class _RMSNorm(torch.autograd.Function):
    """Saves the norm's input and one fp32 per row; backward recomputes everything else."""

    @staticmethod
    def forward(ctx, hidden_TD, residual_TD, weight_D, epsilon):
        ctx.set_materialize_grads(False)
        normed_TD, total_TD, rstd_T1 = _forward(hidden_TD, residual_TD, weight_D, epsilon)
        ctx.save_for_backward(total_TD, weight_D, rstd_T1)
        ctx.has_residual = residual_TD is not None
        return (normed_TD, total_TD) if ctx.has_residual else normed_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_normed_TD, d_total_TD=None):
        total_TD, weight_D, rstd_T1 = ctx.saved_tensors
        if d_normed_TD is None:
            return d_total_TD, d_total_TD if ctx.has_residual else None, None, None
        d_hidden_TD, d_weight_D = _backward(d_normed_TD, d_total_TD, total_TD, weight_D, rstd_T1)
        return d_hidden_TD, d_hidden_TD if ctx.has_residual else None, d_weight_D, None


def _forward(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not launch.uses_triton(hidden_TD):
        total_TD = hidden_TD if residual_TD is None else hidden_TD + residual_TD
        normed_TD, rstd_T1 = reference.rms_norm(total_TD, weight_D, epsilon=epsilon)
        return normed_TD, total_TD, rstd_T1
    _check_kernel_dtype(hidden_TD)
    num_rows, hidden_size = hidden_TD.shape
    hidden_TD = hidden_TD.contiguous()
    normed_TD = torch.empty_like(hidden_TD)
    total_TD = hidden_TD if residual_TD is None else torch.empty_like(hidden_TD)
    rstd_T1 = torch.empty(num_rows, 1, dtype=torch.float32, device=hidden_TD.device)
    block_T, block_D = _tile(hidden_size)
    if num_rows:
        _rms_norm_fwd_kernel[(triton.cdiv(num_rows, block_T),)](
            hidden_TD,
            residual_TD.contiguous() if residual_TD is not None else hidden_TD,
            weight_D,
            normed_TD,
            total_TD,
            rstd_T1,
            num_rows,
            epsilon,
            D=hidden_size,
            BLOCK_T=block_T,
            BLOCK_D=block_D,
            HAS_RESIDUAL=residual_TD is not None,
            num_warps=8,
        )
    return normed_TD, total_TD, rstd_T1


def _backward(
    d_normed_TD: torch.Tensor,
    d_total_TD: torch.Tensor | None,
    total_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not launch.uses_triton(total_TD):
        d_hidden_TD, d_weight_D = reference.rms_norm_backward(d_normed_TD, total_TD, weight_D, rstd_T1)
        if d_total_TD is not None:
            d_hidden_TD = d_hidden_TD.add_(d_total_TD)
        return d_hidden_TD.to(total_TD.dtype), d_weight_D.to(weight_D.dtype)
    num_rows, hidden_size = total_TD.shape
    block_T, block_D = _tile(hidden_size)
    num_programs = min(_BACKWARD_PROGRAMS, triton.cdiv(num_rows, block_T))
    d_hidden_TD = torch.empty_like(total_TD)
    partial_PD = torch.empty(num_programs, hidden_size, dtype=torch.float32, device=total_TD.device)
    if num_rows:
        _rms_norm_bwd_kernel[(num_programs,)](
            d_normed_TD.contiguous(),
            d_total_TD.contiguous() if d_total_TD is not None else d_normed_TD,
            total_TD,
            weight_D,
            rstd_T1,
            d_hidden_TD,
            partial_PD,
            num_rows,
            num_programs,
            D=hidden_size,
            BLOCK_T=block_T,
            BLOCK_D=block_D,
            HAS_D_TOTAL=d_total_TD is not None,
            num_warps=8,
        )
    return d_hidden_TD, partial_PD.sum(0).to(weight_D.dtype)


def _tile(hidden_size: int) -> tuple[int, int]:
    block_D = triton.next_power_of_2(hidden_size)
    return max(1, min(64, _TILE_ELEMENTS // block_D)), block_D


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check(hidden_TD: torch.Tensor, weight_D: torch.Tensor) -> None:
    if weight_D.shape != hidden_TD.shape[-1:]:
        raise ValueError(
            f"weight is {tuple(weight_D.shape)}, hidden is {tuple(hidden_TD.shape)}: "
            "the weight needs one entry per element of hidden's last dimension"
        )


def _check_kernel_dtype(hidden_TD: torch.Tensor) -> None:
    if hidden_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernel computes in fp32, hidden is {hidden_TD.dtype}: pass fp32, bf16 or fp16")


@triton.jit
def _rms_norm_fwd_kernel(
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    rstd_ptr,
    num_rows,
    epsilon,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < D
    mask = (rows < num_rows)[:, None] & is_column[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    stored = tl.load(hidden_ptr + offsets, mask=mask, other=0.0)
    dtype = stored.dtype
    hidden = stored.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # The norm uses the rounded sum, as stored in the residual stream.
        rounded = (hidden + residual).to(dtype)
        tl.store(total_ptr + offsets, rounded, mask=mask)
        hidden = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(hidden * hidden, axis=1) / D + epsilon)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    unit = (hidden * rstd[:, None]).to(dtype).to(tl.float32)
    tl.store(normed_ptr + offsets, (unit * weight[None, :]).to(dtype), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    d_normed_ptr,
    d_total_ptr,
    total_ptr,
    weight_ptr,
    rstd_ptr,
    d_hidden_ptr,
    partial_ptr,
    num_rows,
    num_programs,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_D_TOTAL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < D
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    num_tiles = tl.cdiv(num_rows, BLOCK_T)
    # Two stages: the next tile is loaded while this one is reduced.
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, num_stages=2):
        rows = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & is_column[None, :]
        offsets = rows[:, None] * D + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        stored = tl.load(total_ptr + offsets, mask=mask, other=0.0)
        grad = tl.load(d_normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_D_TOTAL:
            d_total = tl.load(d_total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        unit = stored.to(tl.float32) * rstd[:, None]
        product = grad * unit
        d_weight += product
        coupling = tl.sum(product * weight[None, :], axis=1) / D
        d_hidden = (grad * weight[None, :] - unit * coupling[:, None]) * rstd[:, None]
        if HAS_D_TOTAL:
            d_hidden += d_total
        tl.store(d_hidden_ptr + offsets, d_hidden.to(stored.dtype), mask=mask)
    partial_offsets = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(partial_ptr + partial_offsets, tl.sum(d_weight, axis=0), mask=is_column)


def compile_cases() -> list[CompileCase]:
    """Return forward and backward at hidden 4096 (6B and 9B), with and without the residual, in bf16."""
    block_T, block_D = _tile(4096)
    shape = {"D": 4096, "BLOCK_T": block_T, "BLOCK_D": block_D}
    constexpr = {"D": "constexpr", "BLOCK_T": "constexpr", "BLOCK_D": "constexpr"}
    forward = {"hidden_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "normed_ptr": "*bf16"}
    forward |= {"total_ptr": "*bf16", "rstd_ptr": "*fp32", "num_rows": "i32", "epsilon": "fp32"}
    backward = {"d_normed_ptr": "*bf16", "d_total_ptr": "*bf16", "total_ptr": "*bf16", "weight_ptr": "*bf16"}
    backward |= {"rstd_ptr": "*fp32", "d_hidden_ptr": "*bf16", "partial_ptr": "*fp32"}
    backward |= {"num_rows": "i32", "num_programs": "i32"}
    cases = []
    for is_fused in (False, True):
        suffix = "_add" if is_fused else ""
        for name, kernel, signature, flag in (
            ("fwd", _rms_norm_fwd_kernel, forward, "HAS_RESIDUAL"),
            ("bwd", _rms_norm_bwd_kernel, backward, "HAS_D_TOTAL"),
        ):
            cases.append(
                CompileCase(
                    name=f"rms_norm{suffix}_{name}/6B/bf16",
                    kernel=kernel,
                    signature=signature | constexpr | {flag: "constexpr"},
                    constexprs=shape | {flag: is_fused},
                    divisible_by_16=tuple(key for key in signature if key.endswith("_ptr")),
                    num_warps=8,
                    notes="6B and 9B share hidden 4096",
                )
            )
    return cases
