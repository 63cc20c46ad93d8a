"""KL shaping, GAE, returns and whitening over packed sequences, against loops that users know."""

import math
from itertools import pairwise

import pytest
import torch
from advantage_batches import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import DEVICE

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.rl.advantages import ppo_advantages

FIELDS = ("advantages_T", "returns_T", "token_rewards_T", "kl_T")


def loop_over_time(
    logprobs, ref_logprobs, values, rewards, cu_seqlens, mask,
    *, kl_coef, gamma, lam, kl_estimator="k1", token_rewards_T=None, bootstrap_B=None,
):  # fmt: skip
    """The definition, token by token, in Python floats (fp64)."""
    num_tokens = logprobs.numel()
    out = {name: [0.0] * num_tokens for name in FIELDS}
    bounds = cu_seqlens.tolist()
    estimate = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.expm1(-d) + d,
    }[kl_estimator]
    for sequence, (begin, end) in enumerate(pairwise(bounds)):
        actions = [t for t in range(begin, end) if mask[t]]
        next_value = 0.0 if bootstrap_B is None else bootstrap_B[sequence].item()
        next_advantage = 0.0
        for t in reversed(actions):
            kl = estimate(logprobs[t].item() - ref_logprobs[t].item())
            reward = -kl_coef * kl
            reward += 0.0 if token_rewards_T is None else token_rewards_T[t].item()
            reward += rewards[sequence].item() if t == actions[-1] else 0.0
            value = values[t].item()
            next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
            next_value = value
            for name, number in zip(
                FIELDS, (next_advantage, next_advantage + value, reward, kl), strict=True
            ):
                out[name][t] = number
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in out.items()}


def assert_equals_loop(batch, **options):
    expected = loop_over_time(*batch, **options)
    result = ppo_advantages(*batch, **options)
    for name in FIELDS:
        actual = getattr(result, name)
        assert actual.dtype == torch.float32
        largest = expected[name].abs().max().item() if expected[name].numel() else 0.0
        # PERFORMANCE.md: 2e-6 · max|A|; the same share of the largest entry for the other outputs.
        torch.testing.assert_close(
            actual.double().cpu(), expected[name], rtol=0, atol=2e-6 * largest, msg=name
        )
    advantages, mask = expected["advantages_T"], batch[-1].cpu()
    sums = torch.stack((mask.sum(), advantages.sum(), advantages.square().sum()))
    # fp64 sums of A, compared with sums of the loop's A: only the KL's fp32 rounding remains.
    torch.testing.assert_close(result.whitening_sums().cpu(), sums, rtol=2e-6, atol=2e-6 * float(sums[2] + 1))
    return result


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_awkward_lengths_equal_the_loop(implementation, dtype, kl_estimator):
    batch = random_batch([0, 1, 3, 63, 0, 200, 1, 2, 0], dtype=dtype)
    with forced(implementation):
        assert_equals_loop(batch, kl_coef=0.05, gamma=0.99, lam=0.95, kl_estimator=kl_estimator)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.999, 0.999), (1.0, 0.0), (0.0, 1.0), (0.3, 0.3)])
def test_thousand_tokens_stay_accurate_at_every_horizon(implementation, gamma, lam):
    """The horizon at 0.999² is 500 tokens: an fp32 decay would be off by 500 roundings."""
    batch = random_batch([1000], seed=1)
    with forced(implementation):
        assert_equals_loop(batch, kl_coef=0.1, gamma=gamma, lam=lam)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_token_rewards_and_bootstrap_equal_the_loop(implementation):
    batch = random_batch([5, 0, 130, 1, 40], seed=2)
    generator = torch.Generator().manual_seed(3)
    with forced(implementation):
        assert_equals_loop(
            batch,
            kl_coef=0.2,
            gamma=0.97,
            lam=0.9,
            token_rewards_T=torch.randn(176, generator=generator).to(DEVICE),
            bootstrap_B=torch.randn(5, generator=generator).to(DEVICE),
        )


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_long_sequence_among_short_ones_carries_over_its_blocks(implementation):
    """The block follows the mean length, here 128 tokens; 700 tokens with a gap of 340 need six."""
    batch = list(random_batch([2] * 20 + [700] + [3] * 20, seed=4, keep=0.5))
    batch[-1][60:400] = False  # no action token in at least two whole blocks
    with forced(implementation):
        assert_equals_loop(tuple(batch), kl_coef=0.1, gamma=0.995, lam=0.97)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_hand_worked_two_turns(implementation):
    """gamma = lam = 1/2, kl_coef = 1, one user turn (masked) between the two action tokens.

    r_1 = -(−1 − (−2)) = −1; r_2 = −(−3 − (−3.5)) + 10 = 9.5
    A_2 = 9.5 + 0 − 4 = 5.5;  A_1 = −1 + 4/2 − 3 + 5.5/4 = −0.625
    """
    arguments = (
        torch.tensor([-7.0, -1.0, -9.0, -9.0, -3.0]),
        torch.tensor([-7.5, -2.0, -1.0, -1.0, -3.5]),
        torch.tensor([100.0, 3.0, 100.0, 100.0, 4.0]),
        torch.tensor([10.0]),
        torch.tensor([0, 5], dtype=torch.int32),
        torch.tensor([False, True, False, False, True]),
    )
    with forced(implementation):
        result = ppo_advantages(*(a.to(DEVICE) for a in arguments), kl_coef=1.0, gamma=0.5, lam=0.5)
    # Every number is a binary fraction: equality is exact.
    assert result.token_rewards_T.tolist() == [0.0, -1.0, 0.0, 0.0, 9.5]
    assert result.kl_T.tolist() == [0.0, 1.0, 0.0, 0.0, 0.5]
    assert result.advantages_T.tolist() == [0.0, -0.625, 0.0, 0.0, 5.5]
    assert result.returns_T.tolist() == [0.0, 2.375, 0.0, 0.0, 9.5]
    assert result.whitening_sums().tolist() == [2.0, 4.875, 0.625**2 + 5.5**2]


def trl_gae(rewards_BL, values_BL, *, gamma, lam):
    """TRL's PPOTrainer: responses without gaps, zero after the last token."""
    advantages, last = [], torch.zeros(rewards_BL.shape[0], dtype=rewards_BL.dtype)
    length = rewards_BL.shape[1]
    for t in range(length - 1, -1, -1):
        following = values_BL[:, t + 1] if t < length - 1 else 0.0
        last = rewards_BL[:, t] + gamma * following - values_BL[:, t] + gamma * lam * last
        advantages.append(last)
    return torch.stack(advantages[::-1], dim=1)


def verl_gae(rewards_BL, values_BL, mask_BL, *, gamma, lam):
    """verl's estimator: the loop runs over padding and observations, whose state it throws away."""
    last = following = torch.zeros(rewards_BL.shape[0], dtype=rewards_BL.dtype)
    advantages = []
    for t in range(rewards_BL.shape[1] - 1, -1, -1):
        keep = mask_BL[:, t].to(rewards_BL.dtype)
        stepped = rewards_BL[:, t] + gamma * following - values_BL[:, t] + gamma * lam * last
        following = values_BL[:, t] * keep + (1 - keep) * following
        last = stepped * keep + (1 - keep) * last
        advantages.append(last)
    return torch.stack(advantages[::-1], dim=1)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_equals_trl_on_prompts_and_responses(implementation):
    prompt, response, num_sequences = 6, 17, 5
    length = prompt + response
    batch = random_batch([length] * num_sequences, seed=5)
    mask = torch.arange(num_sequences * length, device=DEVICE) % length >= prompt
    logprobs, ref_logprobs, values, rewards = (tensor.cpu().double() for tensor in batch[:4])
    rewards_BL = (-0.05 * (logprobs - ref_logprobs)).view(num_sequences, length)[:, prompt:].clone()
    rewards_BL[:, -1] += rewards
    values_BL = values.view(num_sequences, length)[:, prompt:]
    expected_BL = trl_gae(rewards_BL, values_BL, gamma=1.0, lam=0.95)
    with forced(implementation):
        result = ppo_advantages(*batch[:5], mask, kl_coef=0.05, gamma=1.0, lam=0.95)
    actual_BL = result.advantages_T.cpu().double().view(num_sequences, length)
    assert (actual_BL[:, :prompt] == 0).all()
    bound = 2e-6 * expected_BL.abs().max().item()  # PERFORMANCE.md
    torch.testing.assert_close(actual_BL[:, prompt:], expected_BL, rtol=0, atol=bound)
    returns_BL = result.returns_T.cpu().double().view(num_sequences, length)[:, prompt:]
    torch.testing.assert_close(returns_BL, expected_BL + values_BL, rtol=0, atol=bound)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_equals_verl_on_padded_multi_turn_batches(implementation):
    """Right padding of different lengths; gaps, a gap before the end, and one sequence masked throughout."""
    lengths, longest = [9, 1, 14, 5, 14], 14
    batch = random_batch(lengths, seed=6)
    mask = batch[-1].cpu()
    mask[9:10] = True
    mask[10 + 11 : 10 + 14] = False  # the third sequence ends in a tool's turn
    mask[24:29] = False  # the fourth has no action token
    token_rewards = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(7))
    padded = {name: torch.zeros(5, longest, dtype=torch.float64) for name in ("rewards", "values", "mask")}
    begin = 0
    for row, length in enumerate(lengths):
        span = slice(begin, begin + length)
        log_ratio = batch[0][span].cpu().double() - batch[1][span].cpu().double()
        padded["rewards"][row, :length] = token_rewards[span].double() - 0.3 * log_ratio
        padded["values"][row, :length] = batch[2][span].cpu().double()
        padded["mask"][row, :length] = mask[span].double()
        actions = mask[span].nonzero()
        if actions.numel():
            padded["rewards"][row, actions.max()] += batch[3][row].cpu().double()
        begin += length
    expected_BL = verl_gae(padded["rewards"], padded["values"], padded["mask"], gamma=0.98, lam=0.9)
    with forced(implementation):
        result = ppo_advantages(
            *batch[:5],
            mask.to(DEVICE),
            kl_coef=0.3,
            gamma=0.98,
            lam=0.9,
            token_rewards_T=token_rewards.to(DEVICE),
        )
    expected_T = torch.cat([row[:length] for row, length in zip(expected_BL, lengths, strict=True)])
    expected_T = torch.where(mask, expected_T, 0.0)  # verl leaves the carry on masked tokens
    bound = 2e-6 * expected_T.abs().max().item()  # PERFORMANCE.md
    torch.testing.assert_close(result.advantages_T.cpu().double(), expected_T, rtol=0, atol=bound)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_gamma_and_lambda_one_leave_reward_to_go_minus_value(implementation):
    batch = random_batch([50, 7], seed=8, keep=1.1)
    with forced(implementation):
        result = ppo_advantages(*batch, kl_coef=0.1, gamma=1.0, lam=1.0)
    rewards = result.token_rewards_T.double()
    to_go = torch.cat([part.flip(0).cumsum(0).flip(0) for part in rewards.split([50, 7])])
    # returns = A + V = the sum of the rewards still to come; one fp32 rounding of sums of 50 terms.
    torch.testing.assert_close(result.returns_T.double(), to_go, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_masked_tokens_may_hold_anything(implementation):
    batch = random_batch([40, 9, 33], seed=9)
    mask = batch[-1]
    poisoned = [torch.where(mask, tensor, torch.nan) for tensor in batch[:3]]
    extra = torch.zeros(82, device=DEVICE)
    with forced(implementation):
        clean = ppo_advantages(*batch, kl_coef=0.1, gamma=0.99, lam=0.95, token_rewards_T=extra)
        dirty = ppo_advantages(
            *poisoned,
            *batch[3:],
            kl_coef=0.1,
            gamma=0.99,
            lam=0.95,
            token_rewards_T=torch.where(mask, extra, torch.inf),
        )
    for name in (*FIELDS, "whitening_sums_B3"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
        assert name == "whitening_sums_B3" or (getattr(clean, name)[~mask] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_nan_shows_in_its_own_sequence_alone(implementation, lam):
    lengths = [20, 20, 20]
    batch = random_batch(lengths, seed=10, keep=1.1)
    batch[2][25] = torch.nan
    with forced(implementation):
        result = ppo_advantages(*batch, kl_coef=0.1, gamma=0.99, lam=lam)
    is_nan = result.advantages_T.isnan()
    assert is_nan[20:26].all()
    assert not is_nan[:20].any()
    assert not is_nan[26:].any()
    assert result.whitening_sums_B3[:, 1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_nothing_to_train_on_gives_zeros(implementation):
    with forced(implementation):
        batch = random_batch([4, 0, 3], seed=11, keep=-1.0)
        result = ppo_advantages(*batch, kl_coef=0.1, gamma=0.99, lam=0.95)
        assert all((getattr(result, name) == 0).all() for name in FIELDS)
        assert result.whitening_sums().tolist() == [0.0, 0.0, 0.0]
        no_tokens = ppo_advantages(*random_batch([0, 0]), kl_coef=0.1, gamma=0.99, lam=0.95)
        assert no_tokens.advantages_T.shape == (0,)
        assert no_tokens.whitening_sums().tolist() == [0.0, 0.0, 0.0]
        no_sequences = ppo_advantages(*random_batch([]), kl_coef=0.1, gamma=0.99, lam=0.95)
        assert no_sequences.whitening_sums().tolist() == [0.0, 0.0, 0.0]


def test_kernel_gives_the_same_bits_again():
    batch = random_batch([37, 300, 5], seed=12)
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.95, "kl_estimator": "k3"}
    with forced("triton"):
        once, again = (ppo_advantages(*batch, **options) for _ in range(2))
        for name in (*FIELDS, "whitening_sums_B3"):
            assert torch.equal(getattr(once, name), getattr(again, name)), name


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=6),
    keep=st.floats(0.0, 1.0),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_reference_equals_the_loop_for_any_packing(lengths, keep, gamma, lam, seed):
    with forced("reference"):
        assert_equals_loop(random_batch(lengths, seed=seed, keep=keep), kl_coef=0.1, gamma=gamma, lam=lam)


def test_reference_keeps_fp64():
    batch = [tensor.double() if tensor.is_floating_point() else tensor for tensor in random_batch([30, 8])]
    expected = loop_over_time(*batch, kl_coef=0.1, gamma=0.99, lam=0.95)
    with forced("reference"):
        result = ppo_advantages(*batch, kl_coef=0.1, gamma=0.99, lam=0.95)
    # fp64 on both sides; sums of 30 terms in another order.
    torch.testing.assert_close(result.advantages_T.cpu(), expected["advantages_T"], rtol=0, atol=1e-12)
