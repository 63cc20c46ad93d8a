"""Samples against their distribution, and against each other over implementations, batches and shards."""

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.decoding.sampling import Samples, sample
from glm_rlhf.kernels.decoding.sampling_shard import combine_shards, sample_shard
from glm_rlhf.kernels.dispatch import launch

IMPLEMENTATIONS = ["reference", "triton"]


def rows(batch, seed=0, device=DEVICE):
    """Seeds and steps of `batch` rows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "seeds_B": torch.randint(-(2**62), 2**62, (batch,), generator=generator).to(device),
        "steps_B": torch.randint(0, 2**40, (batch,), generator=generator).to(device),
    }


def on_cpu(samples):
    """The samples where their expected values are."""
    return Samples(*(tensor.cpu() for tensor in samples))


def distribution(logits_V, *, temperature=1.0, top_k=0, top_p=1.0, masked_ids_V=None):
    """The stated distribution in float64, by sorting; for logits without ties."""
    logits_V = logits_V.double()
    if masked_ids_V is not None:
        logits_V = logits_V.masked_fill(masked_ids_V, -torch.inf)
    probabilities_V = (logits_V / temperature).softmax(0)
    order = probabilities_V.argsort(descending=True)
    if top_k:
        probabilities_V[order[top_k:]] = 0
        probabilities_V /= probabilities_V.sum()
    mass_before = probabilities_V[order].cumsum(0) - probabilities_V[order]
    probabilities_V[order[mass_before >= top_p]] = 0
    return probabilities_V / probabilities_V.sum()


def assert_drawn_from(tokens, probabilities_V):
    """Chi-square of the counts; ids of probability 0 must not occur at all."""
    counts = torch.bincount(tokens, minlength=len(probabilities_V)).double()
    is_possible = probabilities_V > 0
    assert counts[~is_possible].sum() == 0
    expected = probabilities_V[is_possible] * len(tokens)
    assert expected.min() > 5, "the test needs more draws"
    chi_square = ((counts[is_possible] - expected) ** 2 / expected).sum().item()
    freedom = int(is_possible.sum()) - 1
    # Mean `freedom`, variance twice that: four standard deviations, and room for the skew of few cells.
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 8


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_p": 0.6},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("is_masked", [False, True])
def test_draws_follow_the_stated_distribution(settings, is_masked):
    logits_V = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 0.0, 0.7, 1.4, -0.2])
    masked_V = torch.zeros(9, dtype=torch.bool)
    masked_V[[3, 8]] = is_masked
    logits_BV = logits_V.to(DEVICE).expand(100_000, 9)
    samples = on_cpu(sample(logits_BV, **rows(100_000), **settings, masked_ids_V=masked_V.to(DEVICE)))
    expected_V = distribution(logits_V, **settings, masked_ids_V=masked_V)
    assert_drawn_from(samples.tokens_B, expected_V)
    # fp32 sums of nine terms.
    torch.testing.assert_close(
        samples.logprobs_B.double(), expected_V.log()[samples.tokens_B], rtol=1e-6, atol=1e-6
    )
    untempered_V = logits_V.double().log_softmax(0)
    torch.testing.assert_close(
        samples.untempered_logprobs_B.double(), untempered_V[samples.tokens_B], rtol=1e-6, atol=1e-6
    )


def test_kernel_draws_follow_the_distribution():
    logits_V = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0])
    with launch.forced("triton"):
        samples = sample(logits_V.to(DEVICE).expand(300, 5), **rows(300), temperature=1.5)
    assert_drawn_from(samples.tokens_B.cpu(), distribution(logits_V, temperature=1.5))


@pytest.mark.parametrize("varied", ["seeds_B", "steps_B"])
def test_successive_draws_are_independent(varied):
    numbers_B = torch.arange(200_000, device=DEVICE)
    counting = {"seeds_B": torch.full_like(numbers_B, 7), "steps_B": torch.full_like(numbers_B, 7)}
    counting[varied] = numbers_B
    tokens = sample(torch.zeros(200_000, 5, device=DEVICE), **counting).tokens_B.cpu()
    assert_drawn_from(tokens[::2] * 5 + tokens[1::2], torch.full((25,), 1 / 25, dtype=torch.float64))


def test_masked_ids_are_never_drawn():
    logits_BV = torch.tensor([30.0, 0.0, -20.0, 30.0], device=DEVICE).expand(1_000_000, 4)
    masked_V = torch.tensor([True, False, False, True], device=DEVICE)
    samples = sample(logits_BV, **rows(1_000_000), temperature=2.0, masked_ids_V=masked_V)
    counts = torch.bincount(samples.tokens_B, minlength=4)
    assert counts[0] == counts[3] == 0
    # e^-10 of a million is 45.4, with a standard deviation of 6.7.
    assert 20 < counts[2] < 75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, vocab_size, settings",
    [
        (7, 1, {}),
        (9, 3, {"temperature": 0.8}),
        (8, 63, {"top_p": 0.9}),
        (8, 1000, {"top_k": 20, "temperature": 1.2}),
        (5, 4097, {}),
        (3, 10007, {"top_k": 100, "top_p": 0.7}),
        (2, 65024, {"top_p": 0.95}),
        (2, 151552, {"temperature": 0.7}),
        (5, 101, {"temperature": 0.0}),
        (0, 10, {}),
    ],
)
def test_kernel_and_reference_draw_the_same(batch, vocab_size, settings, dtype):
    generator = torch.Generator().manual_seed(0)
    logits_BV = (3 * torch.randn(batch, vocab_size, generator=generator)).to(DEVICE, dtype)
    masked_V = (torch.rand(vocab_size, generator=generator) < 0.1).to(DEVICE)
    masked_V[0] = False
    results = []
    for implementation in IMPLEMENTATIONS:
        with launch.forced(implementation):
            results.append(sample(logits_BV, **rows(batch), **settings, masked_ids_V=masked_V))
    assert torch.equal(results[0].tokens_B, results[1].tokens_B)
    # fp32 sums over the vocabulary in another order; logprobs of size ten.
    torch.testing.assert_close(results[0].logprobs_B, results[1].logprobs_B, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        results[0].untempered_logprobs_B, results[1].untempered_logprobs_B, rtol=1e-6, atol=2e-6
    )
    exact = logits_BV.double().log_softmax(-1).gather(1, results[0].tokens_B[:, None])[:, 0]
    torch.testing.assert_close(results[1].untempered_logprobs_B.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_draws_the_same_in_any_batch_and_again(implementation):
    logits_BV = torch.randn(12, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    settings = {
        "temperature": torch.linspace(0.0, 2.0, 12).to(DEVICE),
        "top_k": torch.arange(12, dtype=torch.int32, device=DEVICE),
    }
    with launch.forced(implementation):
        together = sample(logits_BV, **rows(12), **settings)
        again = sample(logits_BV, **rows(12), **settings)
        order = torch.tensor([11, 3, 0, 7], device=DEVICE)
        some = {name: row[order] for name, row in (rows(12) | settings).items()}
        apart = sample(logits_BV[order], **some)
    assert all(torch.equal(first, second) for first, second in zip(together, again, strict=True))
    assert torch.equal(apart.tokens_B, together.tokens_B[order])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature_zero_takes_the_lowest_id_of_the_maximum(implementation):
    logits_BV = torch.tensor(
        [[0.0, 5.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0], [-torch.inf, -3.0, -torch.inf, -3.0]], device=DEVICE
    )
    masked_V = torch.tensor([False, True, False, False], device=DEVICE)
    with launch.forced(implementation):
        samples = sample(logits_BV, **rows(3), temperature=0.0, top_k=2, top_p=0.3)
        masked = sample(logits_BV, **rows(3), temperature=0.0, masked_ids_V=masked_V)
    assert samples.tokens_B.tolist() == [1, 0, 1]
    assert samples.logprobs_B.tolist() == [0.0, 0.0, 0.0]
    assert masked.tokens_B.tolist() == [3, 0, 3]
    untempered_B = logits_BV.log_softmax(-1).gather(1, samples.tokens_B[:, None])[:, 0]
    # Four terms in fp32.
    torch.testing.assert_close(samples.untempered_logprobs_B, untempered_B, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e4, 1e30, -1e30])
def test_equal_logits_of_any_size_are_drawn_evenly(size):
    samples = on_cpu(sample(torch.full((50_000, 10), size, device=DEVICE), **rows(50_000)))
    assert_drawn_from(samples.tokens_B, torch.full((10,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(samples.logprobs_B, torch.full((50_000,), -2.302585), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e30, -1e30])
def test_kernel_draws_huge_equal_logits_evenly_over_tiles(size):
    with launch.forced("triton"):
        samples = sample(torch.full((60, 9000), size, device=DEVICE), **rows(60))
    assert_drawn_from(samples.tokens_B.cpu() // 2250, torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_single_possible_id_is_drawn_with_certainty(implementation):
    batch = 20_000 if implementation == "reference" else 25
    logits_BV = torch.full((batch, 7), -torch.inf, device=DEVICE)
    logits_BV[:, 4] = -50.0
    masked_V = torch.tensor([True, True, True, True, True, False, True], device=DEVICE)
    with launch.forced(implementation):
        by_logit = sample(logits_BV, **rows(batch))
        by_mask = sample(torch.randn(batch, 7).to(DEVICE), **rows(batch), masked_ids_V=masked_V, top_p=0.5)
    assert (by_logit.tokens_B == 4).all()
    assert (by_logit.logprobs_B == 0).all()
    assert (by_mask.tokens_B == 5).all()
    assert (by_mask.logprobs_B == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_rows_that_cannot_be_drawn_say_so_and_leave_their_neighbours_alone(temperature, implementation):
    logits_BV = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    masked_V = torch.zeros(5000, dtype=torch.bool, device=DEVICE)
    masked_V[1000:] = True
    with launch.forced(implementation):
        clean = sample(logits_BV, **rows(6), temperature=temperature, masked_ids_V=masked_V)
        logits_BV[1, 3] = torch.nan
        logits_BV[2, 3] = torch.inf
        logits_BV[3] = -torch.inf
        logits_BV[4, :1000] = -torch.inf
        samples = sample(logits_BV, **rows(6), temperature=temperature, masked_ids_V=masked_V)
    assert samples.tokens_B[1:5].tolist() == [-1] * 4
    assert samples.logprobs_B[1:5].isnan().all()
    assert samples.untempered_logprobs_B[1:5].isnan().all()
    for before, after in zip(clean, samples, strict=True):
        assert torch.equal(before[[0, 5]], after[[0, 5]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("limits", [{}, {"top_k": 20}, {"top_p": 0.5}])
def test_temperatures_whose_inverse_overflows_are_the_limits_that_they_approach(limits, implementation):
    logits_BV = torch.randn(8, 700, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    masked_V = torch.zeros(700, dtype=torch.bool, device=DEVICE)
    masked_V[500:] = True
    temperature_B = torch.tensor([1e-45, 1e-40, 1.2e-38, 1e-30, 1e37, 3e38, 3.4e38, 1.0], device=DEVICE)
    with launch.forced(implementation):
        greedy = sample(logits_BV, **rows(8), temperature=0.0, masked_ids_V=masked_V)
        one = sample(logits_BV, **rows(8), masked_ids_V=masked_V, **limits)
        samples = sample(logits_BV, **rows(8), temperature=temperature_B, masked_ids_V=masked_V, **limits)
    assert torch.equal(samples.tokens_B[:4], greedy.tokens_B[:4])
    assert samples.logprobs_B[:4].tolist() == [0.0] * 4
    num_kept = {"top_k": 20, "top_p": 250}.get(next(iter(limits), ""), 500)
    uniform = torch.full((3,), num_kept).log().neg()
    torch.testing.assert_close(samples.logprobs_B[4:7].cpu(), uniform, rtol=1e-5, atol=0.0)
    assert samples.tokens_B[7] == one.tokens_B[7]
    assert not masked_V[samples.tokens_B].any()


def test_a_temperature_that_is_nan_draws_nothing():
    statistics = sample_shard(
        torch.zeros(2, 5, device=DEVICE),
        temperature_B=torch.tensor([torch.nan, 1.0], device=DEVICE),
        **rows(2),
    )
    assert (combine_shards(statistics[None]).tokens_B == -1).tolist() == [True, False]


def test_wrong_arguments_are_named():
    logits_BV, row = torch.zeros(2, 5), rows(2, device="cpu")
    with pytest.raises(ValueError, match="temperature is -1"):
        sample(logits_BV, **row, temperature=-1.0)
    for temperature in (1e40, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature is"):
            sample(logits_BV, **row, temperature=temperature)
    with pytest.raises(ValueError, match="temperature holds"):
        sample(logits_BV, **row, temperature=torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="top_p is 0"):
        sample(logits_BV, **row, top_p=0.0)
    with pytest.raises(ValueError, match="top_k is -1"):
        sample(logits_BV, **row, top_k=-1)
    with pytest.raises(ValueError, match=r"top_k is .* required is torch.int32"):
        sample(logits_BV, **row, top_k=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="masked ids are"):
        sample(logits_BV, **row, masked_ids_V=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"seeds are .* required is int64 \[2\]"):
        sample(logits_BV, seeds_B=torch.zeros(2), steps_B=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"required is a float \[B, V\]"):
        sample(torch.zeros(2, 5, dtype=torch.int64), **row)
    with launch.forced("triton"), pytest.raises(ValueError, match="float64"):
        sample(logits_BV.double().to(DEVICE), **rows(2))
