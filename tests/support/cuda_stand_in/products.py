"""Matrix products that only CUDA supports: bf16 factors with fp32 results."""

import torch


def register() -> None:
    """Give the stand-in these operators."""
    for name, function in (
        ("mm.dtype", product),
        ("mm.dtype_out", product_into),
        ("addmm.dtype", sum_with_product),
        ("addmm.dtype_out", sum_with_product_into),
    ):
        _LIBRARY.impl(name, function, "CUDA")


def product(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """As `mm` with `out_dtype`."""
    _check(left, out_dtype)
    return torch.mm(left.to(out_dtype), right.to(out_dtype))


def product_into(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor):
    """As `mm` with `out_dtype` and `out`."""
    return out.copy_(product(left, right, out_dtype))


def sum_with_product(
    start: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """As `addmm` with `out_dtype`."""
    _check(left, out_dtype)
    wide = (tensor.to(out_dtype) for tensor in (start, left, right))
    return torch.addmm(*wide, beta=beta, alpha=alpha)


def sum_with_product_into(*args: object, out: torch.Tensor, **options: float) -> torch.Tensor:
    """As `addmm` with `out_dtype` and `out`."""
    return out.copy_(sum_with_product(*args, **options))


def _check(factor: torch.Tensor, out_dtype: torch.dtype) -> None:
    if out_dtype != factor.dtype and (out_dtype, factor.dtype) != (torch.float32, torch.bfloat16):
        raise RuntimeError(f"a product of {factor.dtype} has no {out_dtype} output")


_LIBRARY = torch.library.Library("aten", "IMPL")
