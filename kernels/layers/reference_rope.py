"""Interleaved rotary position embedding in plain torch."""

import torch


def rotate_in_place(heads_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> None:
    """Rotate the pairs (2i, 2i + 1), i < R, of every head by the angle (t, i), in place.

    new[2i] = old[2i] · cos[t, i] − old[2i + 1] · sin[t, i]
    new[2i + 1] = old[2i + 1] · cos[t, i] + old[2i] · sin[t, i]

    Computed in fp32 (float64 for float64 input); elements from 2R on do not change. T is the first dimension
    of heads and H the last; there may be several between.
    """
    dtype = torch.float64 if heads_TNH.dtype == torch.float64 else torch.float32
    rotate_complex_in_place(heads_TNH, torch.complex(cos_TR.to(dtype), sin_TR.to(dtype)))


def rotate_complex_in_place(heads_TNH: torch.Tensor, angle_TR: torch.Tensor) -> None:
    """Rotate as `rotate_in_place`, by angles cos + i · sin that the caller computes once for many tensors."""
    pairs_TNR2 = heads_TNH[..., : 2 * angle_TR.shape[-1]].unflatten(-1, (-1, 2))
    angle_T1R = angle_TR.view(angle_TR.shape[0], *[1] * (heads_TNH.ndim - 2), angle_TR.shape[1])
    if heads_TNH.dtype == angle_TR.dtype.to_real() and _is_pair_aligned(heads_TNH):
        # A complex product rotates in one pass over memory.
        torch.view_as_complex(pairs_TNR2).mul_(angle_T1R)
        return
    wide_TNR2 = pairs_TNR2.to(angle_TR.dtype.to_real(), memory_format=torch.contiguous_format, copy=True)
    pairs_TNR2.copy_(torch.view_as_real(torch.view_as_complex(wide_TNR2).mul_(angle_T1R)))


def _is_pair_aligned(heads_TNH: torch.Tensor) -> bool:
    """Return whether every pair starts at an even element, as a complex view of the memory needs."""
    strides = heads_TNH.stride()
    return strides[-1] == 1 and not any(s % 2 for s in (*strides[:-1], heads_TNH.storage_offset()))
