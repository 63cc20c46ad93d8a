"""RMSNorm in plain torch, rounded as in the Hugging Face GLM models."""

import torch


def rms_norm(
    hidden_TD: torch.Tensor, weight_D: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (normed_TD in hidden's dtype, rstd_T1 in fp32).

    rstd[t] = 1 / sqrt(mean_d hidden[t, d]² + epsilon)
    normed[t, d] = round(hidden[t, d] · rstd[t]) · weight[d], `round` being the cast to hidden's dtype

    Float64 input is computed in float64, everything else in fp32.
    """
    wide_TD = hidden_TD.to(_compute_dtype(hidden_TD))
    # One reduction without a [T, D] temporary: on a CPU temporaries cost more than arithmetic.
    rstd_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
    rstd_T1 = rstd_T1.square_().mul_(1.0 / hidden_TD.shape[-1]).add_(epsilon).rsqrt_()
    normed_TD = (wide_TD * rstd_T1).to(hidden_TD.dtype)
    if weight_D.dtype == normed_TD.dtype:
        return normed_TD.mul_(weight_D), rstd_T1
    return (normed_TD * weight_D).to(hidden_TD.dtype), rstd_T1


def rms_norm_backward(
    grad_TD: torch.Tensor, hidden_TD: torch.Tensor, weight_D: torch.Tensor, rstd_T1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (d_hidden_TD, d_weight_D) in the compute dtype.

    With unit[t, d] = hidden[t, d] · rstd[t] and g the gradient of normed:
    d_weight[d] = Σ_t g[t, d] · unit[t, d]
    d_hidden[t, d] = rstd[t] · (g[t, d] · weight[d] − unit[t, d] · mean_e g[t, e] · weight[e] · unit[t, e])
    """
    dtype = _compute_dtype(hidden_TD)
    grad_TD, weight_D = grad_TD.to(dtype), weight_D.to(dtype)
    unit_TD = hidden_TD.to(dtype) * rstd_T1
    product_TD = grad_TD * unit_TD
    d_weight_D = product_TD.sum(0)
    coupling_T1 = torch.mv(product_TD, weight_D).mul_(-1.0 / hidden_TD.shape[-1]).unsqueeze(1)
    d_hidden_TD = torch.mul(grad_TD, weight_D, out=product_TD)
    return d_hidden_TD.addcmul_(unit_TD, coupling_T1).mul_(rstd_T1), d_weight_D


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
