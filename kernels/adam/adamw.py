"""AdamW over a list of tensors in one launch; a bf16 weight keeps its fp32 master in a 16-bit remainder."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.adam import reference_adamw as reference
from glm_rlhf.kernels.adam.reference_adamw import join_master, split_master
from glm_rlhf.kernels.adam.tensor_table import CHUNK_ELEMENTS, AdamWTable
from glm_rlhf.kernels.dispatch.arguments import check_range
from glm_rlhf.kernels.dispatch.launch import CompileCase, uses_triton

# 4 elements per thread at 8 warps: one 16-byte vector of fp32 or half a vector of bf16. 8 elements would need
# an exchange between threads.
BLOCK_ELEMENTS = 1024
NUM_WARPS = 8

# Columns of the address table.
COLUMNS = tl.constexpr(6)


def adamw(
    table: AdamWTable,
    gradients: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    clip_factor: torch.Tensor | None = None,
) -> None:
    """Return nothing; take one AdamW step on every tensor of `table`, in place, in one launch.

    With θ the fp32 master, g = clip_factor · gradient, and t = step:

        θ ← θ · (1 - lr · weight_decay)
        m ← m + (1 - β1) (g - m)
        v ← β2 v + (1 - β2) g²
        θ ← θ - lr / (1 - β1^t) · m / (√v / √(1 - β2^t) + epsilon)

    A bf16 weight and its remainder are joined, updated and split again (`split_master`), so that updates
    smaller than a bf16 rounding accumulate as in fp32. Memory traffic is 28 bytes per parameter with an fp32
    gradient, 26 with bf16: weight, remainder and both moments are read and written, the gradient is read.
    The reference path equals torch.optim.AdamW on the master bit for bit; the kernel differs by roundings.

    Args:
        table: the tensors, see `AdamWTable`.
        gradients: one per weight, of its shape, all bf16 or all fp32, contiguous.
        step: number of this step, ≥ 1.
        lr: learning rate, ≥ 0.
        betas: (β1, β2), each in [0, 1).
        epsilon: > 0.
        weight_decay: decoupled, ≥ 0; multiplied by lr.
        clip_factor: one fp32 number on the device, min(1, limit / norm), or None. If it is NaN or infinite,
            no tensor is changed; the caller has the gradient norm and reports it. The host does not wait
            for it.

    Raises:
        ValueError: the gradients do not fit the table, or a number is out of range.

    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, with lr multiplying the decay as in
    torch.optim.AdamW.
    """
    table.check_gradients(gradients)
    if step < 1:
        raise ValueError(f"step is {step}, required is 1 for the first step")
    check_range("lr", lr, 0.0, float("inf"))
    check_range("weight_decay", weight_decay, 0.0, float("inf"))
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} is {beta}, required is a number in [0, 1)")
    if not epsilon > 0.0:
        raise ValueError(f"epsilon is {epsilon}, required is a positive number")
    if clip_factor is not None and clip_factor.numel() != 1:
        raise ValueError(f"clip_factor has shape {tuple(clip_factor.shape)}, required is one number")
    if not gradients:
        return
    if uses_triton(gradients[0]):
        _launch(table, gradients, step, lr, betas, epsilon, weight_decay, clip_factor)
    else:
        reference.adamw(
            table.weights,
            table.remainders,
            gradients,
            table.first_moments,
            table.second_moments,
            step=step,
            lr=lr,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
            clip_factor=clip_factor,
        )


def _launch(
    table: AdamWTable,
    gradients: Sequence[torch.Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    clip_factor: torch.Tensor | None,
) -> None:
    addresses_N6, is_aligned = table.addresses(gradients)
    chunks_C2 = table.chunks()
    if chunks_C2.shape[0] == 0:
        return
    beta1, beta2 = betas
    _adamw_kernel[(chunks_C2.shape[0],)](
        addresses_N6,
        chunks_C2,
        addresses_N6 if clip_factor is None else clip_factor.float(),
        1.0 - lr * weight_decay,
        1.0 - beta1,
        float(beta2),
        1.0 - beta2,
        (1.0 - beta2**step) ** 0.5,
        float(epsilon),
        lr / (1.0 - beta1**step),
        GRADIENT_TYPE=tl.bfloat16 if gradients[0].dtype == torch.bfloat16 else tl.float32,
        IS_SPLIT=table.remainders is not None,
        HAS_CLIP_FACTOR=clip_factor is not None,
        IS_ALIGNED=is_aligned,
        CHUNK=CHUNK_ELEMENTS,
        BLOCK=BLOCK_ELEMENTS,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _adamw_kernel(
    addresses_ptr,
    chunks_ptr,
    clip_factor_ptr,
    decay_factor,
    first_weight,
    beta2,
    second_weight,
    root_of_correction,
    epsilon,
    step_size,
    GRADIENT_TYPE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_CLIP_FACTOR: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk of one tensor."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + chunk * 2)
    start = tl.multiple_of(tl.load(chunks_ptr + chunk * 2 + 1), CHUNK)
    row = addresses_ptr + tensor * COLUMNS
    weight_type: tl.constexpr = tl.int16 if IS_SPLIT else tl.float32
    weight_ptr = tl.load(row).to(tl.pointer_type(weight_type))
    remainder_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int16))
    gradient_ptr = tl.load(row + 2).to(tl.pointer_type(GRADIENT_TYPE))
    first_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    second_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    if IS_ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        remainder_ptr = tl.multiple_of(remainder_ptr, 16)
        gradient_ptr = tl.multiple_of(gradient_ptr, 16)
        first_ptr = tl.multiple_of(first_ptr, 16)
        second_ptr = tl.multiple_of(second_ptr, 16)
    size = tl.minimum(tl.load(row + 5) - start, CHUNK).to(tl.int32)
    clip_factor = 1.0
    if HAS_CLIP_FACTOR:
        clip_factor = tl.load(clip_factor_ptr)
        # A non-finite gradient norm changes nothing.
        size = tl.where(tl.abs(clip_factor) < float("inf"), size, 0)

    for offset in range(0, size, BLOCK):
        element = offset + tl.arange(0, BLOCK)
        # A mask with an arbitrary end prevents vectorised access, so full blocks use none.
        if offset + BLOCK <= size:
            _update(
                weight_ptr + start, remainder_ptr + start, gradient_ptr + start, first_ptr + start,
                second_ptr + start, element, None, clip_factor, decay_factor, first_weight, beta2,
                second_weight, root_of_correction, epsilon, step_size, IS_SPLIT, HAS_CLIP_FACTOR,
            )  # fmt: skip
        else:
            _update(
                weight_ptr + start, remainder_ptr + start, gradient_ptr + start, first_ptr + start,
                second_ptr + start, element, element < size, clip_factor, decay_factor, first_weight, beta2,
                second_weight, root_of_correction, epsilon, step_size, IS_SPLIT, HAS_CLIP_FACTOR,
            )  # fmt: skip


@triton.jit
def _update(
    weight_ptr, remainder_ptr, gradient_ptr, first_ptr, second_ptr, element, mask, clip_factor, decay_factor,
    first_weight, beta2, second_weight, root_of_correction, epsilon, step_size,
    IS_SPLIT: tl.constexpr, HAS_CLIP_FACTOR: tl.constexpr,
):  # fmt: skip
    """Update one block of elements; `mask` is None for a full block."""
    gradient = tl.load(gradient_ptr + element, mask=mask).to(tl.float32)
    first = tl.load(first_ptr + element, mask=mask)
    second = tl.load(second_ptr + element, mask=mask)
    if IS_SPLIT:
        weight = tl.load(weight_ptr + element, mask=mask).to(tl.int32)
        remainder = tl.load(remainder_ptr + element, mask=mask).to(tl.int32)
        master = ((weight << 16) + remainder).to(tl.float32, bitcast=True)
    else:
        master = tl.load(weight_ptr + element, mask=mask)

    if HAS_CLIP_FACTOR:
        gradient *= clip_factor
    master *= decay_factor
    first += first_weight * (gradient - first)
    second = second * beta2 + second_weight * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(second), root_of_correction) + epsilon
    master -= tl.div_rn(step_size * first, denominator)

    tl.store(first_ptr + element, first, mask=mask)
    tl.store(second_ptr + element, second, mask=mask)
    if IS_SPLIT:
        # The NaN of masters is 0x7FC00000: rounding could turn other payloads into a number.
        bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
        weight = (bits + 0x8000) >> 16
        tl.store(weight_ptr + element, weight.to(tl.int16), mask=mask)
        tl.store(remainder_ptr + element, (bits - (weight << 16)).to(tl.int16), mask=mask)
    else:
        tl.store(weight_ptr + element, master, mask=mask)


def compile_cases() -> list[CompileCase]:
    """Return the kernel for split bf16 and for fp32 weights; 6B and 9B differ only in the table."""
    cases = []
    kinds = (
        ("bf16-gradient-fp32", True, tl.float32),
        ("bf16", True, tl.bfloat16),
        ("fp32", False, tl.float32),
    )
    for kind, is_split, gradient_type in kinds:
        pointers = {"addresses_ptr": "*i64", "chunks_ptr": "*i64", "clip_factor_ptr": "*fp32"}
        scalars = ("decay_factor", "first_weight", "beta2", "second_weight", "root_of_correction")
        constexprs = {
            "GRADIENT_TYPE": gradient_type,
            "IS_SPLIT": is_split,
            "HAS_CLIP_FACTOR": True,
            "IS_ALIGNED": True,
            "CHUNK": CHUNK_ELEMENTS,
            "BLOCK": BLOCK_ELEMENTS,
        }
        signature = pointers | dict.fromkeys((*scalars, "epsilon", "step_size"), "fp32")
        cases.append(
            CompileCase(
                name=f"adamw/6B-9B/{kind}",
                kernel=_adamw_kernel,
                signature=signature | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible_by_16=tuple(pointers),
                num_warps=NUM_WARPS,
            )
        )
    return cases


__all__ = ["AdamWTable", "adamw", "join_master", "split_master"]
