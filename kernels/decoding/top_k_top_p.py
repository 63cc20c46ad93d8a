"""The smallest logit that top-k and top-p keep, without sorting."""

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.decoding import reference_top_k_top_p as reference
from glm_rlhf.kernels.decoding.reference_sampling import INVERSE_HIGH, INVERSE_LOW
from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.dispatch.launch import CompileCase

# One program makes several passes over a whole row in the L2 cache, with the largest possible block. 4096
# elements are 4 per thread; with 8 per thread on fewer warps the compiler spills on some targets.
_BLOCK_V = 4096
_ELEMENTS_PER_WARP = 128
_INVERSE_LOW = tl.constexpr(INVERSE_LOW)
_INVERSE_HIGH = tl.constexpr(INVERSE_HIGH)


@torch.no_grad()
def truncation_threshold(
    logits_BV: torch.Tensor,
    *,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor | None = None,
    top_p_B: torch.Tensor | None = None,
    masked_ids_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the smallest logit to keep, fp32 [B]; −∞ in rows without a limit.

    Among the tokens that are not masked, with probabilities of the logits divided by the temperature:
    top-k keeps a token if fewer than k have a larger logit;
    top-p keeps one of these if those with a larger logit have less than p of the probability of all tokens
    that top-k keeps. Tokens of equal logit are kept or removed together. Temperature 0 removes nothing: the
    maximum is taken.

    The kernel bisects between two logits of the row until they are equal, counting or summing what lies above
    the middle: about 10 to 16 passes over a row that stays in cache.

    Args:
        logits_BV: [B, V], contiguous, fp32, bf16 or fp16 (fp64 on CPU); may hold −∞.
        temperature_B: fp32 [B], ≥ 0.
        top_k_B: int32 [B], 0 for no limit; None for no limit in any row.
        top_p_B: fp32 [B] in (0, 1], 1 for no limit; None for no limit in any row.
        masked_ids_V: bool [V], True for ids that are never sampled; None for none.

    Source: Holtzman et al., "The curious case of neural text degeneration" (2020), for top-p; transformers'
    logits warpers keep equal logits together under top-k only.
    """
    if not launch.uses_triton(logits_BV):
        return reference.truncation_threshold(logits_BV, temperature_B, top_k_B, top_p_B, masked_ids_V)
    batch, vocab_size = logits_BV.shape
    threshold_B = torch.full((batch,), -torch.inf, dtype=torch.float32, device=logits_BV.device)
    if logits_BV.numel() and (top_k_B is not None or top_p_B is not None):
        block_V = min(_BLOCK_V, max(_ELEMENTS_PER_WARP, triton.next_power_of_2(vocab_size)))
        _truncation_fwd_kernel[(batch,)](
            logits_BV,
            masked_ids_V.view(torch.uint8) if masked_ids_V is not None else logits_BV,
            temperature_B,
            top_k_B if top_k_B is not None else logits_BV,
            top_p_B if top_p_B is not None else logits_BV,
            threshold_B,
            vocab_size,
            HAS_MASK=masked_ids_V is not None,
            HAS_TOP_K=top_k_B is not None,
            HAS_TOP_P=top_p_B is not None,
            BLOCK_V=block_V,
            num_warps=block_V // _ELEMENTS_PER_WARP,
        )
    return threshold_B


@triton.jit
def _load_allowed(row_ptr, mask_ptr, start, vocab_size, HAS_MASK: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return one tile of logits in fp32, −∞ where the id is masked or past the vocabulary."""
    ids = start + tl.arange(0, BLOCK_V)
    is_id = ids < vocab_size
    logits = tl.load(row_ptr + ids, mask=is_id, other=float("-inf")).to(tl.float32)
    if HAS_MASK:
        masked = tl.load(mask_ptr + ids, mask=is_id, other=1)
        logits = tl.where(masked != 0, float("-inf"), logits)
    return logits


@triton.jit
def _smallest_kept(
    row_ptr,
    mask_ptr,
    vocab_size,
    low,
    high,
    target,
    maximum,
    inverse_temperature,
    IS_COUNT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return the smallest logit v in [low, high] with less than `target` above it; low, high are logits."""
    while low < high:
        pivot = 0.5 * low + 0.5 * high
        # Rounding may leave the interval; its lower end always gives progress.
        pivot = tl.where((pivot >= low) & (pivot < high), pivot, low)
        above = tl.zeros([BLOCK_V], tl.float32)
        next_above = tl.full([BLOCK_V], float("inf"), tl.float32)
        last_below = tl.full([BLOCK_V], float("-inf"), tl.float32)
        for start in tl.range(0, vocab_size, BLOCK_V, num_stages=3):
            logits = _load_allowed(row_ptr, mask_ptr, start, vocab_size, HAS_MASK, BLOCK_V)
            is_above = logits > pivot
            if IS_COUNT:
                above += tl.where(is_above, 1.0, 0.0)
            else:
                above += tl.where(is_above, tl.exp((logits - maximum) * inverse_temperature), 0.0)
            next_above = tl.minimum(next_above, tl.where(is_above, logits, float("inf")))
            last_below = tl.maximum(last_below, tl.where(is_above, float("-inf"), logits))
        is_kept = tl.sum(above) < target
        low = tl.where(is_kept, low, tl.min(next_above))
        high = tl.where(is_kept, tl.max(last_below), high)
    return high


@triton.jit
def _truncation_fwd_kernel(
    logits_ptr,
    mask_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    threshold_ptr,
    vocab_size,
    HAS_MASK: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab_size
    temperature = tl.load(temperature_ptr + row)
    inverse_temperature = 1.0 / tl.where(temperature > 0.0, temperature, 1.0)
    inverse_temperature = tl.minimum(tl.maximum(inverse_temperature, _INVERSE_LOW), _INVERSE_HIGH)

    largest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK_V], float("inf"), tl.float32)
    count = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=3):
        logits = _load_allowed(row_ptr, mask_ptr, start, vocab_size, HAS_MASK, BLOCK_V)
        is_possible = logits > float("-inf")
        largest = tl.maximum(largest, logits)
        smallest = tl.minimum(smallest, tl.where(is_possible, logits, float("inf")))
        count += tl.where(is_possible, 1.0, 0.0)
    maximum = tl.max(largest)
    minimum = tl.min(smallest)
    # A row with +∞ has no distribution; sampling reports it, the search must only terminate.
    is_searchable = (temperature > 0.0) & (maximum < float("inf"))

    threshold = tl.full([], float("-inf"), tl.float32)
    if HAS_TOP_K:
        top_k = tl.load(top_k_ptr + row).to(tl.float32)
        is_cut = is_searchable & (top_k > 0.0) & (top_k < tl.sum(count))
        low = tl.where(is_cut, minimum, maximum)
        found = _smallest_kept(
            row_ptr, mask_ptr, vocab_size, low, maximum, top_k, maximum, 1.0, True, HAS_MASK, BLOCK_V
        )
        threshold = tl.where(is_cut, found, threshold)
    if HAS_TOP_P:
        total = tl.zeros([BLOCK_V], tl.float32)
        for start in tl.range(0, vocab_size, BLOCK_V, num_stages=3):
            logits = _load_allowed(row_ptr, mask_ptr, start, vocab_size, HAS_MASK, BLOCK_V)
            is_kept = (logits >= threshold) & (logits > float("-inf"))
            total += tl.where(is_kept, tl.exp((logits - maximum) * inverse_temperature), 0.0)
        top_p = tl.load(top_p_ptr + row)
        is_cut = is_searchable & (top_p < 1.0)
        low = tl.where(is_cut, tl.maximum(threshold, minimum), maximum)
        target = top_p * tl.sum(total)
        found = _smallest_kept(
            row_ptr,
            mask_ptr,
            vocab_size,
            low,
            maximum,
            target,
            maximum,
            inverse_temperature,
            False,
            HAS_MASK,
            BLOCK_V,
        )
        threshold = tl.where(is_cut, found, threshold)
    tl.store(threshold_ptr + row, threshold)


def compile_cases() -> list[CompileCase]:
    """Return the search for top-k with top-p over the 6B and 9B vocabularies, bf16 and fp32 logits."""
    constexprs = {"HAS_MASK": True, "HAS_TOP_K": True, "HAS_TOP_P": True, "BLOCK_V": _BLOCK_V}
    pointers = {"mask_ptr": "*u8", "temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32"}
    pointers |= {"threshold_ptr": "*fp32"}
    cases = []
    for dtype in ("bf16", "fp32"):
        signature = {"logits_ptr": f"*{dtype}", **pointers, "vocab_size": "i32"}
        cases.append(
            CompileCase(
                name=f"truncation_threshold/6B/{dtype}",
                kernel=_truncation_fwd_kernel,
                signature=signature | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible_by_16=("logits_ptr", *pointers, "vocab_size"),
                num_warps=_BLOCK_V // _ELEMENTS_PER_WARP,
                notes="9B differs in vocab_size only, an argument",
            )
        )
    return cases
