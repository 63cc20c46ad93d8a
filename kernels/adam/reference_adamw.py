"""AdamW on fp32 masters split into bf16 weights and 16-bit remainders, in plain torch."""

from collections.abc import Sequence

import torch

QUIET_NAN_BITS = 0x7FC00000


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weight bf16, remainder int16), which together equal the fp32 master bit for bit.

    With the fp32 bits read as a 32-bit integer:

        weight bits = (bits + 0x8000) >> 16          remainder = bits - (weight bits << 16)

    The weight is the master rounded to the nearest bf16; a tie, one in 65536, rounds away from zero. Rounding
    ties to even is impossible: 65537 masters would share one even weight, one more than 16 bits distinguish.
    The payload of a NaN is set to zero, so that rounding cannot turn it into a number and the bf16 weight is
    NaN too.

    Args:
        master: [...] fp32.

    Raises:
        ValueError: the dtype is not fp32.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"master is {master.dtype}, required is torch.float32")
    bits = torch.where(master.isnan(), QUIET_NAN_BITS, master.view(torch.int32))
    weight_bits = (bits + 0x8000) >> 16
    remainder = bits - (weight_bits << 16)
    return weight_bits.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the fp32 master that `split_master` split.

    Args:
        weight: [...] bf16.
        remainder: [...] int16, of the same shape; zeros for a weight without an fp32 master.

    Raises:
        ValueError: dtypes do not fit.
    """
    if weight.dtype != torch.bfloat16 or remainder.dtype != torch.int16:
        raise ValueError(
            f"weight is {weight.dtype} and remainder {remainder.dtype}, "
            "required are torch.bfloat16 and torch.int16"
        )
    bits = (weight.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


@torch.no_grad()
def adamw(
    weights: Sequence[torch.Tensor],
    remainders: Sequence[torch.Tensor] | None,
    gradients: Sequence[torch.Tensor],
    first_moments: Sequence[torch.Tensor],
    second_moments: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    clip_factor: torch.Tensor | None,
) -> None:
    """Update every tensor in place: the definition of `glm_rlhf.kernels.adam.adamw.adamw`."""
    if clip_factor is not None and not bool(clip_factor.isfinite()):
        return
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        master = weight if remainders is None else join_master(weight, remainders[index])
        gradient = gradient.to(master.dtype)
        if clip_factor is not None:
            gradient = gradient * clip_factor.to(master.dtype)
        _update(
            master,
            gradient,
            first_moments[index],
            second_moments[index],
            step=step,
            lr=lr,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
        )
        if remainders is not None:
            rounded, remainder = split_master(master)
            weight.copy_(rounded)
            remainders[index].copy_(remainder)


def _update(
    master: torch.Tensor,
    gradient: torch.Tensor,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> None:
    beta1, beta2 = betas
    first_correction, second_correction = 1 - beta1**step, 1 - beta2**step
    master.mul_(1 - lr * weight_decay)
    first_moment.lerp_(gradient, 1 - beta1)
    second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (second_moment.sqrt() / second_correction**0.5).add_(epsilon)
    master.addcdiv_(first_moment, denominator, value=-lr / first_correction)
