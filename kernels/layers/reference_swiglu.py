"""SwiGLU on a packed gate and up projection in plain torch."""

import torch
import torch.nn.functional as F


def swiglu(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up for gate_up = [gate | up], computed in fp32 (float64 for float64 input)."""
    gate_TF, up_TF = gate_up_TF2.to(_compute_dtype(gate_up_TF2)).chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF).to(gate_up_TF2.dtype)


def swiglu_backward(grad_TF: torch.Tensor, gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """Return [d_gate | d_up] in gate_up's dtype.

    With s = sigmoid(gate): d_up = grad · gate · s, d_gate = grad · up · s · (1 + gate · (1 − s)).
    """
    dtype = _compute_dtype(gate_up_TF2)
    grad_TF = grad_TF.to(dtype)
    gate_TF, up_TF = gate_up_TF2.to(dtype).chunk(2, dim=-1)
    d_gate_up_TF2 = torch.empty(gate_up_TF2.shape, dtype=dtype, device=gate_up_TF2.device)
    d_gate_TF, d_up_TF = d_gate_up_TF2.chunk(2, dim=-1)
    # Both gradients are written in place: on a CPU temporaries cost more than arithmetic.
    torch.mul(grad_TF, up_TF, out=d_gate_TF)
    torch.ops.aten.silu_backward.grad_input(d_gate_TF, gate_TF, grad_input=d_gate_TF)
    torch.ops.aten.silu.out(gate_TF, out=d_up_TF)
    d_up_TF.mul_(grad_TF)
    return d_gate_up_TF2.to(gate_up_TF2.dtype)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
