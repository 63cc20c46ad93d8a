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
    """Letter and number, as PERFORMANCE.md lists the hot paths."""
    what: str
    """The task, and which passes are timed."""
    model: str
    """`6B`, `9B`, `6B 9B` where both have this shape, or `small`."""
    shape: str
    """Sizes and dtype, for people."""
    num_bytes: float
    """Fewest bytes that have to be read and written."""
    num_flop: float
    """Fewest floating-point operations of matrix products."""
    build: Callable[[torch.device], Problem]
    """Makes inputs and contenders."""
    target_s: float | None = None
    """What ours is meant to reach on an H200."""
    counts_memory: bool = False
    """Whether the memory of a run is a figure of this row."""


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
    """Return what forgets the gradients of `leaves`."""

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    return clear


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` under torch.compile for fixed shapes; it compiles when it is first called."""
    return torch.compile(function, dynamic=False)


def peers(device: torch.device, contenders: Sequence[Callable[[], Contender]]) -> list[Contender]:
    """Return the peers' contenders; the CPU has none of them."""
    return [make() for make in contenders] if device.type == "cuda" else []
