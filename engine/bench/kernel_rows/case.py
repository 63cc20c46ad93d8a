"""A row of the kernels' benchmark before its tensors exist."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glm_rlhf.engine.bench.harness import Contender, Problem

# Relative error that is not wrong. bf16: contenders that round logits to bf16 are off by some 2⁻⁸.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One task at one shape."""

    row: str
    """Letter and number, unique together with `model`."""
    what: str
    """The task, and which passes are timed."""
    model: str
    """`6B`, `9B`, `6B 9B` where both have this shape, or `small`."""
    shape: str
    """Sizes and dtype, for people."""
    build: Callable[[torch.device], Problem]
    """Makes inputs and contenders."""
    num_bytes: float
    """Fewest bytes that have to be read and written."""
    num_flop: float = 0.0
    """Fewest floating-point operations of matrix products."""
    target_s: float | None = None
    """The goal of ours on an H200."""
    counts_memory: bool = False
    """Whether the memory of a run is a figure of this row."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16`, `float32` and so on."""
    return str(dtype).removeprefix("torch.")


def random_normal(
    *shape: int, device: torch.device, dtype: torch.dtype, std: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """Return normal random numbers that depend on shape, seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.empty(shape, device=device, dtype=dtype)
    # In place and in its own dtype: an fp32 draft of a large tensor would not fit beside the others.
    return values.normal_(0.0, std, generator=generator)


def random_ids(num_ids: int, below: int, *, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return int64 ids in [0, below)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, below, (num_ids,), device=device, generator=generator)


def clearing(*leaves: torch.Tensor) -> Callable[[], None]:
    """Return the function that sets the gradients of `leaves` to None."""

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    return clear


def plain(name: str, run: Callable[[], Any]) -> Contender:
    """Return a contender without preparation."""
    return Contender(name=name, run=run)


def in_torch(
    definition: Callable[..., Any],
    arguments: Sequence[torch.Tensor],
    *,
    how: str = "",
    contender: Callable[[str, Callable[[], Any]], Contender] = plain,
) -> list[Contender]:
    """Return the definition in eager torch, and under torch.compile.

    Args:
        definition: compiled for fixed shapes when it is first called.
        arguments: of the definition.
        how: appended to both names.
        contender: makes a contender of a name and its work.
    """
    compiled = torch.compile(definition, dynamic=False)
    return [
        contender(f"torch eager{how}", lambda: definition(*arguments)),
        contender(f"torch.compile{how}", lambda: compiled(*arguments)),
    ]
