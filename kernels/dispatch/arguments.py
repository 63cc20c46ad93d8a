"""Checks of an op's vector arguments, with messages that state the required value."""

import torch


def check_vectors(**required: tuple[torch.Tensor | None, int]) -> None:
    """Raise ValueError unless each named tensor is one-dimensional, of the given length, on one device.

    Args:
        required: name → (tensor or None, length). None is an omitted argument and is skipped.
    """
    device = None
    for name, (tensor, length) in required.items():
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.numel() != length:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, required is [{length}]")
        if device is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the other arguments on {device}: move it there")
        device = tensor.device


def check_mask(name: str, mask: torch.Tensor) -> None:
    """Raise ValueError unless `mask` is bool."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} is {mask.dtype}, required is torch.bool (True = trained on)")


def check_cu_seqlens(cu_seqlens: torch.Tensor, num_tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` is int32 and, on a CPU, ascends from 0 to `num_tokens`.

    On a GPU the offsets are not read, because the host would wait for the device.
    """
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}, required is torch.int32")
    if cu_seqlens.device.type != "cpu":
        return
    ascends = cu_seqlens[0] == 0 and cu_seqlens[-1] == num_tokens and bool((cu_seqlens.diff() >= 0).all())
    if not ascends:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens[:8].tolist()}{' and so on' if cu_seqlens.numel() > 8 else ''}, "
            f"required are non-decreasing offsets from 0 to the number of tokens, {num_tokens}"
        )


def check_range(name: str, number: float, low: float, high: float) -> None:
    """Raise ValueError unless low ≤ number ≤ high (NaN fails)."""
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, required is a number in [{low}, {high}]")


def check_denominator(denominator: float | torch.Tensor) -> None:
    """Raise ValueError unless a loss's denominator is one positive number.

    A tensor's value is not read, because the host would wait for the device.
    """
    if isinstance(denominator, torch.Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}, required is one number")
    elif not denominator > 0:
        raise ValueError(
            f"denominator is {denominator}, required is a positive number, "
            "such as the tokens trained on over all micro-batches and data-parallel ranks"
        )
