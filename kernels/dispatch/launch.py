"""Dispatch of an op to the Triton kernel or to the fp32 torch reference.

CUDA tensors use the Triton kernel, CPU tensors the reference. The environment variable
`GLM_RLHF_KERNELS` (`auto`, `triton`, `reference`) or the context manager `forced` overrides this;
`triton` on CPU tensors needs Triton's interpreter (`TRITON_INTERPRET=1` before the first import).
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Whether a · b + c may be contracted to one rounding: Triton's default changes with version 3.10.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton

ENVIRONMENT_VARIABLE = "GLM_RLHF_KERNELS"
CHOICES = ("auto", "triton", "reference")

_forced: list[str] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One kernel at one shape, for the ahead-of-time compiler and the benchmark table."""

    name: str
    """`<kernel>/<shape>/<dtype>`, unique over the package, e.g. `linear_logprob_fwd/6B/bf16`."""
    kernel: Any
    """The `triton.jit` function (its undecorated form when the interpreter is on)."""
    signature: dict[str, str]
    """Argument name → Triton type (`*bf16`, `i64`, `fp32`), `constexpr` for compile-time arguments."""
    constexprs: dict[str, Any]
    """Values of the compile-time arguments."""
    divisible_by_16: tuple[str, ...] = ()
    """Arguments whose address or value is a multiple of 16 (otherwise loads are not vectorised)."""
    num_warps: int = 4
    num_stages: int = 3
    launched_on: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities on which it is launched: it is compiled for them and must not spill."""
    notes: str = ""
    """For the table: other shapes that the case covers."""


@contextlib.contextmanager
def forced(choice: str) -> Iterator[None]:
    """Run every op inside the block with one implementation: `triton` or `reference`.

    Raises:
        ValueError: `choice` is none of `auto`, `triton`, `reference`.
    """
    _check(choice)
    _forced.append(choice)
    try:
        yield
    finally:
        _forced.pop()


def requested() -> str:
    """Return the active choice: the innermost `forced` block, else the environment, else `auto`.

    Raises:
        ValueError: the environment variable holds an unknown choice.
    """
    choice = _forced[-1] if _forced else os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    _check(choice)
    return choice


def uses_triton(tensor: torch.Tensor) -> bool:
    """Return whether an op on `tensor` runs its Triton kernel (True) or the torch reference (False).

    Raises:
        ValueError: `triton` is requested for a CPU tensor and the interpreter is off.
    """
    choice = requested()
    if choice == "auto":
        return tensor.is_cuda
    if choice == "triton" and not tensor.is_cuda and not is_interpreting():
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}=triton on a {tensor.device} tensor needs Triton's interpreter: "
            "set TRITON_INTERPRET=1 before glm_rlhf.kernels is imported"
        )
    return choice == "triton"


def is_interpreting() -> bool:
    """Return whether the kernels of this process run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def _check(choice: str) -> None:
    if choice not in CHOICES:
        raise ValueError(f"kernels: unknown choice {choice!r}, use one of {', '.join(CHOICES)}")
