"""Uniform random numbers as a function of seed, step and vocabulary index (Philox)."""

import numpy as np
import torch

# The smallest number for which Philox 4×32 passes TestU01's BigCrush (Salmon et al.); ten cost 40 % more.
NUM_ROUNDS = 7
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def uniforms(
    seeds_B: torch.Tensor, steps_B: torch.Tensor, num_indices: int, *, first_index: int = 0
) -> torch.Tensor:
    """Return fp32 [B, num_indices] in [2^-33, 1 − 2^-24], one for each index from first_index on.

    u[b, i] = min(2^-32 · float(word) + 2^-33, 1 − 2^-24)

    where word is number i % 4 of the four that Philox computes for the counter (i // 4, low half of steps[b],
    its high half, 0) and the key seeds[b]. Rows with equal seed and step are equal in every batch. Small u,
    which decide the race in sampling, have full precision.

    Args:
        seeds_B: int64 [B], any value.
        steps_B: int64 [B], any value.
        num_indices: numbers per row.
        first_index: index of the first, ≥ 0.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), Philox 4×32; the stream of
    `triton.language.philox` with the same number of rounds. In numpy, whose 64-bit unsigned arithmetic is
    three times as fast as torch's.
    """
    first_counter = first_index // 4
    num_counters = -(-(first_index + num_indices) // 4) - first_counter
    seeds_B1 = seeds_B.cpu().numpy().astype(np.uint64)[:, None]
    steps_B1 = steps_B.cpu().numpy().astype(np.uint64)[:, None]
    counters_1C = np.arange(first_counter, first_counter + num_counters, dtype=np.uint64)[None]
    zero_11 = np.zeros((1, 1), dtype=np.uint64)
    words = _philox((counters_1C, steps_B1 & _LOW, steps_B1 >> _HALF, zero_11), seeds_B1)
    words_BC4 = np.empty((len(seeds_B1), num_counters, 4), dtype=np.float32)
    for position, word_BC in enumerate(words):
        words_BC4[:, :, position] = word_BC
    skipped = first_index - 4 * first_counter
    words_BI = words_BC4.reshape(len(seeds_B1), -1)[:, skipped : skipped + num_indices]
    uniforms_BI = torch.from_numpy(words_BI).mul_(2.0**-32).add_(2.0**-33).clamp_(max=1.0 - 2.0**-24)
    return uniforms_BI.to(seeds_B.device)


def _philox(counter: tuple[np.ndarray, ...], key: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the four words of each counter, 32-bit numbers in uint64; arrays broadcast."""
    c0, c1, c2, c3 = counter
    key0, key1 = key & _LOW, key >> _HALF
    # A 32 × 32-bit product fits 64 bits exactly. Until the rounds mix them, the words of step and key have
    # one element per row, so the first two rounds are cheap.
    for _ in range(NUM_ROUNDS):
        product0, product2 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (product2 >> _HALF) ^ (c1 ^ key0)
        c2 = (product0 >> _HALF) ^ (c3 ^ key1)
        c1, c3 = product2 & _LOW, product0 & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3
