"""SwiGLU on the packed gate and up projection."""

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.dispatch.launch import CompileCase
from glm_rlhf.kernels.layers import reference_swiglu as reference

# Columns of a tile: 8 per thread with 4 warps, one 16-byte bf16 load each of gate and up. 13696 columns fill
# 13.4 such tiles, so that 4 % of the lanes are idle.
_BLOCK_F = 1024
# Elements of a tile: two rows, so that every thread has four loads in flight (six in backward).
_TILE_ELEMENTS = 2048


def swiglu(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up for the packed projection [gate | up], in its dtype.

    out[t, f] = gate[t, f] · sigmoid(gate[t, f]) · up[t, f], gate[t, f] = gate_up[t, f],
    up[t, f] = gate_up[t, F + f]

    One rounding, after the product. Backward recomputes the sigmoid; only the input is saved.

    Args:
        gate_up_TF2: [..., 2F], fp32, bf16 or fp16 (fp64 on CPU). A tensor-parallel rank's shard is
            [its gate columns | its up columns].

    Returns:
        [..., F], the input's dtype; differentiable (once).

    Raises:
        ValueError: the last dimension is odd or 0, or the kernel gets float64.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6.
    """
    if gate_up_TF2.shape[-1] % 2 or gate_up_TF2.shape[-1] == 0:
        raise ValueError(
            f"gate_up is {tuple(gate_up_TF2.shape)}: its last dimension holds gate and up, "
            "so it must be even and not 0"
        )
    flat_TF2 = gate_up_TF2.reshape(-1, gate_up_TF2.shape[-1])
    if torch.is_grad_enabled() and gate_up_TF2.requires_grad:
        out_TF = _SwiGLU.apply(flat_TF2)
    else:
        out_TF = _forward(flat_TF2)
    return out_TF.view(*gate_up_TF2.shape[:-1], gate_up_TF2.shape[-1] // 2)


class _SwiGLU(torch.autograd.Function):
    """Saves only the packed input."""

    @staticmethod
    def forward(ctx, gate_up_TF2):
        ctx.save_for_backward(gate_up_TF2)
        return _forward(gate_up_TF2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TF):
        return _backward(grad_TF, *ctx.saved_tensors)


def _forward(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    if not launch.uses_triton(gate_up_TF2):
        return reference.swiglu(gate_up_TF2)
    _check_kernel_dtype(gate_up_TF2)
    gate_up_TF2 = gate_up_TF2.contiguous()
    num_rows, ffn_size = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty(num_rows, ffn_size, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    if out_TF.numel():
        block = _block(ffn_size)
        _swiglu_fwd_kernel[_grid(num_rows, block, ffn_size)](
            gate_up_TF2, out_TF, num_rows, F=ffn_size, **block, num_warps=4
        )
    return out_TF


def _backward(grad_TF: torch.Tensor, gate_up_TF2: torch.Tensor) -> torch.Tensor:
    if not launch.uses_triton(gate_up_TF2):
        return reference.swiglu_backward(grad_TF, gate_up_TF2)
    gate_up_TF2 = gate_up_TF2.contiguous()
    num_rows, ffn_size = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    d_gate_up_TF2 = torch.empty_like(gate_up_TF2)
    if grad_TF.numel():
        block = _block(ffn_size)
        _swiglu_bwd_kernel[_grid(num_rows, block, ffn_size)](
            grad_TF.contiguous(), gate_up_TF2, d_gate_up_TF2, num_rows, F=ffn_size, **block, num_warps=4
        )
    return d_gate_up_TF2


def _block(ffn_size: int) -> dict[str, int]:
    block_F = min(_BLOCK_F, triton.next_power_of_2(ffn_size))
    return {"BLOCK_T": _TILE_ELEMENTS // block_F, "BLOCK_F": block_F}


def _grid(num_rows: int, block: dict[str, int], ffn_size: int) -> tuple[int, int]:
    # Rows are the first grid axis: only this one may exceed 65535.
    return triton.cdiv(num_rows, block["BLOCK_T"]), triton.cdiv(ffn_size, block["BLOCK_F"])


def _check_kernel_dtype(tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernel computes in fp32, gate_up is {tensor.dtype}: pass fp32, bf16 or fp16")


@triton.jit
def _swiglu_fwd_kernel(
    gate_up_ptr, out_ptr, num_rows, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < num_rows)[:, None] & (columns < F)[None, :]
    gate_ptrs = gate_up_ptr + rows[:, None] * (2 * F) + columns[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + rows[:, None] * F + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr,
    gate_up_ptr,
    d_gate_up_ptr,
    num_rows,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < num_rows)[:, None] & (columns < F)[None, :]
    packed_offsets = rows[:, None] * (2 * F) + columns[None, :]
    grad = tl.load(grad_ptr + rows[:, None] * F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + packed_offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + packed_offsets + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = grad * gate * sigmoid
    dtype = d_gate_up_ptr.dtype.element_ty
    tl.store(d_gate_up_ptr + packed_offsets, d_gate.to(dtype), mask=mask)
    tl.store(d_gate_up_ptr + packed_offsets + F, d_up.to(dtype), mask=mask)


def compile_cases() -> list[CompileCase]:
    """Return forward and backward at ffn 13696 (6B and 9B) in bf16."""
    cases = []
    for name, kernel, pointers in (
        ("fwd", _swiglu_fwd_kernel, ("gate_up_ptr", "out_ptr")),
        ("bwd", _swiglu_bwd_kernel, ("grad_ptr", "gate_up_ptr", "d_gate_up_ptr")),
    ):
        constexprs = {"F": 13696, **_block(13696)}
        signature = dict.fromkeys(pointers, "*bf16") | {"num_rows": "i32"}
        cases.append(
            CompileCase(
                name=f"swiglu_{name}/6B/bf16",
                kernel=kernel,
                signature=signature | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible_by_16=pointers,
                num_warps=4,
                notes="6B and 9B share ffn 13696",
            )
        )
    return cases
