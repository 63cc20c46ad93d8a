"""Whitening of advantages, and the inputs that the estimate refuses."""

import math

import pytest
import torch
from advantage_batches import packed, random_batch

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.rl.advantages import ppo_advantages, whiten


def test_whitening_equals_masked_mean_and_unbiased_deviation():
    batch = random_batch([50, 30, 0, 20], seed=13)
    mask = batch[-1]
    result = ppo_advantages(*batch, kl_coef=0.1, gamma=1.0, lam=0.95)
    trained = result.advantages_T[mask].double()
    whitened = whiten(result.advantages_T, mask, result.whitening_sums())
    expected = (trained - trained.mean()) / (trained.var(correction=1) + 1e-8).sqrt()
    # The result is rounded to fp32 once; entries are below 4.
    torch.testing.assert_close(whitened[mask].double(), expected, rtol=0, atol=5e-7)
    assert (whitened[~mask] == 0).all()
    scaled = whiten(result.advantages_T, mask, result.whitening_sums(), shifts_mean=False)
    torch.testing.assert_close(scaled[mask].double(), expected + trained.mean(), rtol=0, atol=5e-7)


def test_the_mean_is_kept_where_it_is_not_shifted():
    """By hand: mean 3, variance 4, and one masked token."""
    advantages = torch.tensor([1.0, 9.0, 3.0, 5.0])
    mask = torch.tensor([True, False, True, True])
    sums = torch.tensor([3.0, 9.0, 35.0], dtype=torch.float64)
    kept = whiten(advantages, mask, sums, shifts_mean=False, epsilon=1e-12)
    torch.testing.assert_close(kept, torch.tensor([2.0, 0.0, 3.0, 4.0]), rtol=0, atol=1e-6)


def test_whitening_sums_of_two_ranks_are_those_of_the_whole_batch():
    lengths = [13, 30, 7, 21]
    batch = random_batch(lengths, seed=14)
    options = {"kl_coef": 0.1, "gamma": 1.0, "lam": 0.95}
    whole = ppo_advantages(*batch, **options)
    parts = [
        ppo_advantages(
            *(tensor[tokens] for tensor in batch[:3]),
            batch[3][sequences],
            packed(lengths[sequences]),
            batch[5][tokens],
            **options,
        )
        for tokens, sequences in ((slice(0, 43), slice(0, 2)), (slice(43, 71), slice(2, 4)))
    ]
    summed = parts[0].whitening_sums() + parts[1].whitening_sums()
    # fp64 sums in another order.
    torch.testing.assert_close(summed, whole.whitening_sums(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_trained", [0, 1])
def test_whitening_without_variance_is_zero_not_nan(num_trained):
    advantages = torch.tensor([3.0, 0.0, 0.0])
    mask = torch.tensor([num_trained == 1, False, False])
    sums = torch.tensor([float(num_trained), 3.0 * num_trained, 9.0 * num_trained], dtype=torch.float64)
    assert whiten(advantages, mask, sums).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"gamma": math.nan}, "gamma is nan"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"kl_coef": -1.0}, "kl_coef is -1.0"),
        ({"kl_estimator": "k9"}, "k1, k2, k3"),
        ({"token_rewards_T": torch.zeros(3)}, r"token_rewards_T has shape \(3,\), required is \[10\]"),
        ({"bootstrap_B": torch.zeros(3)}, r"bootstrap_B has shape \(3,\), required is \[2\]"),
    ],
)
def test_bad_options_are_refused(change, message):
    options = {"kl_coef": 0.1, "gamma": 1.0, "lam": 0.95} | change
    with pytest.raises(ValueError, match=message):
        ppo_advantages(*random_batch([4, 6]), **options)


@pytest.mark.parametrize(
    "index, wrong, message",
    [
        (1, torch.zeros(9), "ref_logprobs_T has shape"),
        (4, torch.tensor([0, 10], dtype=torch.int32), "cu_seqlens has shape"),
        (4, torch.tensor([0, 4, 10]), "cu_seqlens is torch.int64"),
        (4, torch.tensor([0, 4, 9], dtype=torch.int32), "cu_seqlens is .0, 4, 9., required"),
        (4, torch.tensor([1, 4, 10], dtype=torch.int32), "cu_seqlens is .1, 4, 10., required"),
        (4, torch.tensor([0, 12, 10], dtype=torch.int32), "cu_seqlens is .0, 12, 10., required"),
        (5, torch.ones(10), "action_mask_T is torch.float32"),
    ],
)
def test_bad_tensors_are_refused(index, wrong, message):
    """On the host: on a GPU the offsets are not read, which would make the host wait."""
    batch = [tensor.cpu() for tensor in random_batch([4, 6])]
    batch[index] = wrong
    with forced("reference"), pytest.raises(ValueError, match=message):
        ppo_advantages(*batch, kl_coef=0.1, gamma=1.0, lam=0.95)
