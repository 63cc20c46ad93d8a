"""Philox against its authors' test vectors and Triton's generator."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.decoding import philox


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_words_equal_the_authors_vectors_for_seven_rounds(counter, key, expected):
    words = philox._philox(tuple(np.array(np.uint64(word)) for word in counter), np.array(np.uint64(key)))
    assert tuple(int(word) for word in words) == expected


@triton.jit
def _words_kernel(words_ptr, seed, step_low, step_high, N: tl.constexpr, ROUNDS: tl.constexpr):
    counters = tl.arange(0, N).to(tl.uint32)
    zeros = counters * 0
    words = tl.philox(seed, counters, zeros + step_low, zeros + step_high, zeros, n_rounds=ROUNDS)
    for position in tl.static_range(4):
        tl.store(words_ptr + tl.arange(0, N) * 4 + position, words[position].to(tl.int64))


def test_uniforms_are_those_of_tritons_generator():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed, step = 0x7EDCBA9876543210, (5 << 32) + 77
    words = torch.empty(256, dtype=torch.int64, device=device)
    _words_kernel[(1,)](words, seed, 77, 5, N=64, ROUNDS=philox.NUM_ROUNDS)
    uniforms = philox.uniforms(torch.tensor([seed]), torch.tensor([step]), 256)
    expected = words.cpu().float() * 2.0**-32 + 2.0**-33
    assert torch.equal(uniforms[0], expected.clamp(max=1 - 2.0**-24))


def test_any_first_index_continues_the_same_stream_in_any_batch():
    seeds, steps = torch.tensor([3, -1, 2**63 - 1]), torch.tensor([0, 2**40, -5])
    whole = philox.uniforms(seeds, steps, 100)
    for first in (1, 2, 3, 4, 50, 99):
        assert torch.equal(philox.uniforms(seeds, steps, 100 - first, first_index=first), whole[:, first:])
    assert torch.equal(philox.uniforms(seeds[1:2], steps[1:2], 100)[0], whole[1])


def test_uniforms_fill_the_interval_evenly_and_stay_inside():
    uniforms = philox.uniforms(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 1000)
    assert 0 < uniforms.min()
    assert uniforms.max() < 1
    counts = torch.histc(uniforms, bins=100, min=0, max=1)
    chi_square = ((counts - 1e4) ** 2 / 1e4).sum().item()
    # 99 degrees of freedom: mean 99, standard deviation 14; both tails, for too even is as wrong.
    assert 45 < chi_square < 155


@pytest.mark.parametrize("neighbour", ["seed", "step", "index"])
def test_neighbours_are_independent(neighbour):
    base = torch.arange(300_000) * 2
    zeros = torch.zeros_like(base)
    if neighbour == "index":
        pair = philox.uniforms(base, zeros, 2).T
    else:
        rows = (
            [(base, zeros), (base + 1, zeros)] if neighbour == "seed" else [(zeros, base), (zeros, base + 1)]
        )
        pair = [philox.uniforms(seeds, steps, 1)[:, 0] for seeds, steps in rows]
    cells = (pair[0] * 10).long() * 10 + (pair[1] * 10).long()
    counts = torch.bincount(cells, minlength=100).double()
    chi_square = ((counts - 3000) ** 2 / 3000).sum().item()
    # As above.
    assert 45 < chi_square < 155
