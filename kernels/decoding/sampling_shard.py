"""Sampling of a token from a sharded vocabulary."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.decoding import philox
from glm_rlhf.kernels.decoding import reference_sampling as reference
from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.dispatch.launch import CompileCase

# Most ids per program, all in registers, 16 per thread. At batch 64 the 65024 ids of 6B make 1024 programs of
# 8 warps, eight per multiprocessor of an H100.
_BLOCK_V = 4096
_IDS_PER_WARP = 512
# Token ids are stored in fp32 among a row's statistics.
MAX_VOCAB_SIZE = 2**24

_NUM_ROUNDS = tl.constexpr(philox.NUM_ROUNDS)
_MAXIMUM = tl.constexpr(reference.MAXIMUM)
_TOTAL = tl.constexpr(reference.TOTAL)
_UNTEMPERED_MAXIMUM = tl.constexpr(reference.UNTEMPERED_MAXIMUM)
_UNTEMPERED_TOTAL = tl.constexpr(reference.UNTEMPERED_TOTAL)
_BEST = tl.constexpr(reference.BEST)
_TOKEN = tl.constexpr(reference.TOKEN)
_LOGIT = tl.constexpr(reference.LOGIT)
_INVERSE_TEMPERATURE = tl.constexpr(reference.INVERSE_TEMPERATURE)
_NUM_STATISTICS = tl.constexpr(reference.NUM_STATISTICS)
_INVERSE_LOW = tl.constexpr(reference.INVERSE_LOW)
_INVERSE_HIGH = tl.constexpr(reference.INVERSE_HIGH)


class Samples(NamedTuple):
    """One sampled token per row, with its log-probability under two distributions."""

    tokens_B: torch.Tensor
    """int64 [B], ids; −1 if nothing can be sampled: no allowed id, or a logit that is NaN or +∞."""
    logprobs_B: torch.Tensor
    """fp32 [B], under the sampling distribution (mask, temperature, top-k, top-p): 0 at temperature 0, NaN at
    token −1."""
    untempered_logprobs_B: torch.Tensor
    """fp32 [B], under the softmax of all V logits (no mask, temperature 1, no truncation), as
    `linear_logprob` and `logprobs_from_logits` return it; NaN at token −1."""


def sample_shard(
    logits_BV: torch.Tensor,
    *,
    seeds_B: torch.Tensor,
    steps_B: torch.Tensor,
    temperature_B: torch.Tensor,
    masked_ids_V: torch.Tensor | None = None,
    threshold_B: torch.Tensor | None = None,
    vocab_offset: int = 0,
) -> torch.Tensor:
    """Return the sampling statistics of one vocabulary shard for each row: fp32 [B, 8].

    For tensor parallelism: every rank calls this on its columns, the ranks gather the results into
    [shards, B, 8] (32 bytes per row and rank), and `combine_shards` gives every rank the same token, the one
    that `sample` returns for the concatenated columns. Padding columns past the vocabulary must be sliced
    off, not masked: masked ids still count in the untempered distribution.

    Args:
        logits_BV: [B, V of this shard].
        seeds_B, steps_B: as in `sample`, equal on all shards.
        temperature_B: fp32 [B], ≥ 0; 0 takes the maximum.
        masked_ids_V: bool [V of this shard] or None.
        threshold_B: fp32 [B], ids with smaller logits are removed (see `truncation_threshold`, which needs
            whole rows); None removes nothing.
        vocab_offset: id of the shard's first column.

    Returns:
        Maximum and sum of the tempered and of the untempered distribution, and the shard's best candidate;
        `reference_sampling` names the columns.

    Raises:
        ValueError: as `sample`.
    """
    statistics_SB8 = tile_statistics(
        logits_BV,
        seeds_B=seeds_B,
        steps_B=steps_B,
        temperature_B=temperature_B,
        masked_ids_V=masked_ids_V,
        threshold_B=threshold_B,
        vocab_offset=vocab_offset,
    )
    return _combine(statistics_SB8)[0] if launch.uses_triton(logits_BV) else statistics_SB8[0]


@torch.no_grad()
def tile_statistics(
    logits_BV: torch.Tensor,
    *,
    seeds_B: torch.Tensor,
    steps_B: torch.Tensor,
    temperature_B: torch.Tensor,
    masked_ids_V: torch.Tensor | None = None,
    threshold_B: torch.Tensor | None = None,
    vocab_offset: int = 0,
) -> torch.Tensor:
    """Return `sample_shard`'s statistics before they are joined, [tiles, B, 8]; one tile on CPU."""
    check_sampling(logits_BV, seeds_B, steps_B, masked_ids_V, vocab_offset)
    batch, vocab_size = logits_BV.shape
    device = logits_BV.device
    if not launch.uses_triton(logits_BV):
        statistics_B8 = reference.shard_statistics(
            logits_BV,
            temperature_B,
            seeds_B,
            steps_B,
            masked_ids_V,
            threshold_B,
            vocab_offset=vocab_offset,
        )
        return statistics_B8[None]
    if logits_BV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the kernel computes in fp32, logits are {logits_BV.dtype}: pass fp32, bf16 or fp16"
        )
    logits_BV = logits_BV.contiguous()
    # Tiles start at ids that are multiples of 4, because Philox returns four words per counter.
    shift = vocab_offset % 4
    block_V = min(_BLOCK_V, max(_IDS_PER_WARP, triton.next_power_of_2(vocab_size + shift)))
    num_tiles = triton.cdiv(vocab_size + shift, block_V)
    statistics_SB8 = torch.empty(
        num_tiles, batch, reference.NUM_STATISTICS, dtype=torch.float32, device=device
    )
    if batch:
        # Rows are the first grid axis: only this one may exceed 65535.
        _sample_fwd_kernel[(batch, num_tiles)](
            logits_BV,
            masked_ids_V.view(torch.uint8) if masked_ids_V is not None else logits_BV,
            threshold_B if threshold_B is not None else temperature_B,
            temperature_B,
            seeds_B,
            steps_B,
            statistics_SB8,
            batch,
            vocab_size,
            vocab_offset // 4,
            SHIFT=shift,
            HAS_MASK=masked_ids_V is not None,
            HAS_THRESHOLD=threshold_B is not None,
            BLOCK_V=block_V,
            num_warps=block_V // _IDS_PER_WARP,
        )
    return statistics_SB8


@torch.no_grad()
def combine_shards(statistics_SB8: torch.Tensor) -> Samples:
    """Return the samples for the statistics of all shards or tiles, [shards, B, 8]."""
    if not launch.uses_triton(statistics_SB8):
        return Samples(*reference.combine(statistics_SB8))
    return _combine(statistics_SB8.contiguous())[1]


def _combine(statistics_SB8: torch.Tensor) -> tuple[torch.Tensor, Samples]:
    """Return the joined statistics [B, 8] and their samples."""
    num_shards, batch, _ = statistics_SB8.shape
    joined_B8 = torch.empty_like(statistics_SB8[0])
    tokens_B = torch.empty(batch, dtype=torch.int64, device=statistics_SB8.device)
    logprobs_B, untempered_logprobs_B = torch.empty(
        2, batch, dtype=torch.float32, device=statistics_SB8.device
    )
    if batch:
        _sample_combine_kernel[(batch,)](
            statistics_SB8,
            joined_B8,
            tokens_B,
            logprobs_B,
            untempered_logprobs_B,
            num_shards,
            batch,
            BLOCK_S=triton.next_power_of_2(num_shards),
            num_warps=1,
        )
    return joined_B8, Samples(tokens_B, logprobs_B, untempered_logprobs_B)


def check_sampling(
    logits_BV: torch.Tensor,
    seeds_B: torch.Tensor,
    steps_B: torch.Tensor,
    masked_ids_V: torch.Tensor | None,
    vocab_offset: int = 0,
) -> None:
    """Raise ValueError if the arguments of sampling are inconsistent."""
    if logits_BV.ndim != 2 or not logits_BV.is_floating_point() or logits_BV.shape[1] == 0:
        raise ValueError(
            f"logits are {tuple(logits_BV.shape)} {logits_BV.dtype}, required is a float [B, V], V > 0"
        )
    if vocab_offset < 0 or vocab_offset + logits_BV.shape[1] > MAX_VOCAB_SIZE:
        raise ValueError(
            f"{logits_BV.shape[1]} ids from {vocab_offset} on: required are ids in [0, {MAX_VOCAB_SIZE})"
        )
    for name, tensor in (("seeds", seeds_B), ("steps", steps_B)):
        if tensor.shape != logits_BV.shape[:1] or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name} are {tuple(tensor.shape)} {tensor.dtype}, required is int64 [{logits_BV.shape[0]}]"
            )
    if masked_ids_V is not None and (
        masked_ids_V.shape != logits_BV.shape[1:] or masked_ids_V.dtype != torch.bool
    ):
        raise ValueError(
            f"masked ids are {tuple(masked_ids_V.shape)} {masked_ids_V.dtype}, "
            f"required is bool [{logits_BV.shape[1]}], True for ids that are never sampled"
        )


@triton.jit
def _exponentials(seed, step, counters, BLOCK_V: tl.constexpr):
    """Return BLOCK_V exponentially distributed numbers, four per counter; see `philox`."""
    step_low = (step & 0xFFFFFFFF).to(tl.uint32)
    step_high = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed, counters, step_low, step_high, counters * 0, n_rounds=_NUM_ROUNDS
    )
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK_V)
    uniform = words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    uniform = tl.minimum(uniform, 0.999999940395355225)  # 1 - 2^-24
    # −log(1 − u): near 0, which decides the race, 1 − u has lost the digits of u; the series keeps them.
    series = 1.0 + uniform * (0.5 + uniform * (1.0 / 3 + uniform * (0.25 + uniform * (0.2 + uniform / 6.0))))
    return tl.where(uniform < 0.0625, uniform * series, -tl.log(1.0 - uniform))


@triton.jit
def _sample_fwd_kernel(
    logits_ptr,
    mask_ptr,
    threshold_ptr,
    temperature_ptr,
    seeds_ptr,
    steps_ptr,
    statistics_ptr,
    batch,
    vocab_size,
    first_counter,
    SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V) - SHIFT
    is_id = (ids >= 0) & (ids < vocab_size)
    logits = tl.load(logits_ptr + row * vocab_size + ids, mask=is_id, other=float("-inf")).to(tl.float32)

    kept = logits
    if HAS_MASK:
        masked = tl.load(mask_ptr + ids, mask=is_id, other=1)
        kept = tl.where(masked != 0, float("-inf"), kept)
    if HAS_THRESHOLD:
        kept = tl.where(kept < tl.load(threshold_ptr + row), float("-inf"), kept)
    temperature = tl.load(temperature_ptr + row)
    is_greedy = temperature <= 0.0
    inverse = 1.0 / tl.where(is_greedy, 1.0, temperature)
    inverse = tl.where(inverse > _INVERSE_HIGH, _INVERSE_HIGH, inverse)  # a NaN stays one
    inverse = tl.where(inverse < _INVERSE_LOW, _INVERSE_LOW, inverse)

    maximum = tl.max(kept)
    scaled = (kept - tl.where(maximum == float("-inf"), 0.0, maximum)) * inverse
    untempered_maximum = tl.max(logits)
    untempered_exp = tl.exp(logits - tl.where(untempered_maximum == float("-inf"), 0.0, untempered_maximum))

    counters = (first_counter + tile * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)).to(tl.uint32)
    exponential = _exponentials(tl.load(seeds_ptr + row), tl.load(steps_ptr + row), counters, BLOCK_V)
    race = tl.where(is_greedy, scaled, scaled - tl.log(exponential))
    race = tl.where(kept == float("-inf"), float("-inf"), race)
    best = tl.max(race)
    # Ties: the lowest id. With a NaN none is equal: the sums report it, and any id will do.
    winner = tl.min(tl.where((race == best) & is_id, ids, vocab_size - 1))

    statistics = statistics_ptr + (tile * batch + row) * _NUM_STATISTICS
    tl.store(statistics + _MAXIMUM, maximum)
    tl.store(statistics + _TOTAL, tl.sum(tl.exp(scaled)))
    tl.store(statistics + _UNTEMPERED_MAXIMUM, untempered_maximum)
    tl.store(statistics + _UNTEMPERED_TOTAL, tl.sum(untempered_exp))
    tl.store(statistics + _BEST, best)
    tl.store(statistics + _TOKEN, (first_counter * 4 + SHIFT + winner).to(tl.float32))
    tl.store(statistics + _LOGIT, tl.sum(tl.where(ids == winner, logits, 0.0)))
    tl.store(statistics + _INVERSE_TEMPERATURE, tl.where(is_greedy, 0.0, inverse))


@triton.jit
def _sample_combine_kernel(
    statistics_ptr,
    joined_ptr,
    tokens_ptr,
    logprobs_ptr,
    untempered_logprobs_ptr,
    num_shards,
    batch,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    shards = tl.arange(0, BLOCK_S)
    is_shard = shards < num_shards
    statistics = statistics_ptr + (shards * batch + row) * _NUM_STATISTICS
    maxima = tl.load(statistics + _MAXIMUM, mask=is_shard, other=float("-inf"))
    totals = tl.load(statistics + _TOTAL, mask=is_shard, other=0.0)
    untempered_maxima = tl.load(statistics + _UNTEMPERED_MAXIMUM, mask=is_shard, other=float("-inf"))
    untempered_totals = tl.load(statistics + _UNTEMPERED_TOTAL, mask=is_shard, other=0.0)
    bests = tl.load(statistics + _BEST, mask=is_shard, other=float("-inf"))
    tokens = tl.load(statistics + _TOKEN, mask=is_shard, other=float("inf"))
    inverse = tl.load(statistics_ptr + row * _NUM_STATISTICS + _INVERSE_TEMPERATURE)
    is_greedy = inverse == 0.0

    maximum = tl.max(maxima)
    lag = maxima - tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(totals * tl.exp(lag * tl.where(is_greedy, 1.0, inverse)))
    untempered_maximum = tl.max(untempered_maxima)
    untempered_lag = untempered_maxima - tl.where(
        untempered_maximum == float("-inf"), 0.0, untempered_maximum
    )
    untempered_total = tl.sum(untempered_totals * tl.exp(untempered_lag))

    race = bests + lag * tl.where(is_greedy, 1.0, inverse)
    best = tl.max(race)
    token = tl.min(tl.where(race == best, tokens, float("inf")))
    logits = tl.load(statistics + _LOGIT, mask=is_shard, other=0.0)
    logit = tl.sum(tl.where((tokens == token) & is_shard, logits, 0.0))
    logprob = tl.where(is_greedy, 0.0, (logit - maximum) * inverse - tl.log(total))
    untempered_logprob = logit - untempered_maximum - tl.log(untempered_total)

    is_valid = (maximum != float("-inf")) & (untempered_total == untempered_total) & (total == total)
    tl.store(tokens_ptr + row, tl.where(is_valid, token, -1.0).to(tl.int64))
    tl.store(logprobs_ptr + row, tl.where(is_valid, logprob, float("nan")))
    tl.store(untempered_logprobs_ptr + row, tl.where(is_valid, untempered_logprob, float("nan")))

    joined = joined_ptr + row * _NUM_STATISTICS
    tl.store(joined + _MAXIMUM, maximum)
    tl.store(joined + _TOTAL, total)
    tl.store(joined + _UNTEMPERED_MAXIMUM, untempered_maximum)
    tl.store(joined + _UNTEMPERED_TOTAL, untempered_total)
    # Relative to the joined maximum, as a shard's best is relative to the shard's maximum.
    tl.store(joined + _BEST, best)
    tl.store(joined + _TOKEN, token)
    tl.store(joined + _LOGIT, logit)
    tl.store(joined + _INVERSE_TEMPERATURE, inverse)


def compile_cases() -> list[CompileCase]:
    """Return sampling of one tile, and the combination for 6B (16 tiles) and 9B (37), bf16 or fp32."""
    cases = []
    pointers = {"mask_ptr": "*u8", "threshold_ptr": "*fp32", "temperature_ptr": "*fp32"}
    pointers |= {"seeds_ptr": "*i64", "steps_ptr": "*i64", "statistics_ptr": "*fp32"}
    scalars = {"batch": "i32", "vocab_size": "i32", "first_counter": "i32"}
    for dtype, is_untruncated in (("bf16", True), ("bf16", False), ("fp32", False)):
        constexprs = {"SHIFT": 0, "HAS_MASK": True, "HAS_THRESHOLD": not is_untruncated, "BLOCK_V": _BLOCK_V}
        cases.append(
            CompileCase(
                name=f"sample_fwd/6B{'' if is_untruncated else '-truncated'}/{dtype}",
                kernel=_sample_fwd_kernel,
                signature={"logits_ptr": f"*{dtype}"}
                | pointers
                | scalars
                | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible_by_16=("logits_ptr", *pointers, "vocab_size"),
                num_warps=_BLOCK_V // _IDS_PER_WARP,
                notes="9B differs in vocab_size only, an argument",
            )
        )
    results = {"statistics_ptr": "*fp32", "joined_ptr": "*fp32", "tokens_ptr": "*i64"}
    results |= {"logprobs_ptr": "*fp32", "untempered_logprobs_ptr": "*fp32"}
    for name, num_tiles in (("6B", 16), ("9B", 64)):
        cases.append(
            CompileCase(
                name=f"sample_combine/{name}/fp32",
                kernel=_sample_combine_kernel,
                signature=results | {"num_shards": "i32", "batch": "i32", "BLOCK_S": "constexpr"},
                constexprs={"BLOCK_S": num_tiles},
                divisible_by_16=tuple(results),
                num_warps=1,
            )
        )
    return cases
