"""PPO's value loss, its closed-form gradient and its statistics, against formulas that users know."""

import math

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.rl.reference_value_loss import VALUE_SUMS
from glm_rlhf.kernels.rl.value_loss import ppo_value_loss

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "triton"])


def random_tokens(num_tokens, *, seed=0, dtype=torch.float32, keep=0.7):
    """Return values (a leaf), old values, returns, mask."""
    generator = torch.Generator().manual_seed(seed)
    old_values = torch.randn(num_tokens, generator=generator)
    values = old_values + 0.3 * torch.randn(num_tokens, generator=generator)
    returns = values + 0.5 * torch.randn(num_tokens, generator=generator)
    mask = torch.rand(num_tokens, generator=generator) < keep
    values, old_values, returns = (t.to(dtype).to(DEVICE) for t in (values, old_values, returns))
    return values.requires_grad_(), old_values, returns, mask.to(DEVICE)


def run(tensors, **options):
    loss, statistics = ppo_value_loss(*tensors, **options)
    (gradient,) = torch.autograd.grad(loss, tensors[0])
    return loss.detach(), statistics, gradient


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 63, 1000])
@pytest.mark.parametrize("value_clip", [0.2, None])
def test_equals_trl_and_verl_in_fp64(implementation, dtype, num_tokens, value_clip):
    """Both: half the mean over tokens of the larger of the two squared errors; share of tokens clipped."""
    tensors = random_tokens(num_tokens, seed=num_tokens, dtype=dtype)
    values, old_values, returns = (tensor.detach().double() for tensor in tensors[:3])
    values.requires_grad_()
    mask = tensors[3]
    count = max(int(mask.sum()), 1)
    with forced(implementation):
        loss, statistics, gradient = run(tensors, value_clip=value_clip, denominator=count)

    errors = (values - returns) ** 2
    clipped_errors = errors
    if value_clip is not None:
        clipped = torch.clamp(values, old_values - value_clip, old_values + value_clip)
        clipped_errors = (clipped - returns) ** 2
    expected = 0.5 * (torch.max(errors, clipped_errors) * mask).sum() / count
    (expected_gradient,) = torch.autograd.grad(expected, values)
    # One fp32 rounding a step over terms of order one.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=1e-7)
    assert gradient.dtype == dtype
    # bf16 gradients are rounded once: 2⁻⁹ relative.
    rtol = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-9)
    values = values.detach()
    for actual, wanted in (
        (statistics.num_tokens, mask.sum()),
        (statistics.value_loss, expected.detach()),
        (statistics.clip_fraction, ((clipped_errors > errors) & mask).sum() / count),
        (statistics.value_mean, (values * mask).sum() / count),
        (statistics.return_mean, (returns * mask).sum() / count),
        (statistics.num_nonfinite, torch.tensor(0.0)),
    ):
        # fp32 sums of at most 1000 terms of order one.
        torch.testing.assert_close(actual.double().cpu(), wanted.double().cpu(), rtol=1e-5, atol=1e-6)
    if count > 1:
        variance = torch.var(returns[mask] - values[mask], correction=0) / torch.var(
            returns[mask], correction=0
        )
        # Differences of fp32 sums: 1e-6 of the second moments.
        torch.testing.assert_close(statistics.explained_variance.double(), 1 - variance, rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
def test_hand_worked_clipping(implementation):
    """clip ½, old value 0. V, R: (1, 1) → V' = ½: ½·¼ clipped; (1, -1) → ½·4 free; (¼, 1) → ½·9/16 inside."""
    values = torch.tensor([1.0, 1.0, 0.25], device=DEVICE, requires_grad=True)
    returns = torch.tensor([1.0, -1.0, 1.0], device=DEVICE)
    mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
    with forced(implementation):
        loss, statistics = ppo_value_loss(
            values, torch.zeros(3, device=DEVICE), returns, mask, value_clip=0.5, denominator=2.0
        )
    (gradient,) = torch.autograd.grad(loss, values)
    # Binary fractions: exact.
    assert loss.item() == (0.125 + 2.0 + 0.28125) / 2
    assert gradient.tolist() == [0.0, 1.0, -0.375]
    assert statistics.total("num_clipped").item() == 1
    assert statistics.return_mean.item() == pytest.approx(1 / 3)
    # errors 0, -2, 3/4: variance 1.6250 - (5/12)² ; returns: 1 - 1/9.
    errors = (4 + 0.5625) / 3 - (1.25 / 3) ** 2
    assert statistics.explained_variance.item() == pytest.approx(1 - errors / (8 / 9), rel=1e-5)


@IMPLEMENTATIONS
def test_values_inside_the_range_never_lose_their_gradient_to_rounding(implementation):
    """old + (V - old) rounds away from V; clipping V between two bounds does not."""
    generator = torch.Generator().manual_seed(1)
    old_values = 100 * torch.randn(2000, generator=generator)
    values = old_values + 0.01 * torch.randn(2000, generator=generator)
    returns = values + 1e-5 * torch.randn(2000, generator=generator)
    mask = torch.ones(2000, dtype=torch.bool)
    tensors = [tensor.to(DEVICE) for tensor in (values, old_values, returns, mask)]
    tensors[0].requires_grad_()
    with forced(implementation):
        _, statistics, gradient = run(tensors, value_clip=0.2, denominator=1.0)
    assert statistics.clip_fraction.item() == 0
    assert torch.equal(gradient, (tensors[0] - tensors[2]).detach())


@IMPLEMENTATIONS
@pytest.mark.parametrize("scale, expected", [(1.0, 1.0), (0.0, 0.0), (-1.0, -3.0)])
def test_explained_variance_of_perfect_constant_and_inverted_critics(implementation, scale, expected):
    returns = torch.randn(600, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones(600, dtype=torch.bool, device=DEVICE)
    with forced(implementation):
        _, statistics = ppo_value_loss(
            (scale * returns).requires_grad_(), None, returns, mask, denominator=600
        )
    # 1 - (1 - scale)²; fp32 sums of 600 terms.
    assert statistics.explained_variance.item() == pytest.approx(expected, abs=1e-5)


def test_explained_variance_of_equal_returns_is_nan():
    ones = torch.ones(8)
    _, statistics = ppo_value_loss(torch.zeros(8), None, ones, torch.ones(8, dtype=torch.bool), denominator=8)
    assert statistics.explained_variance.isnan()


@pytest.mark.parametrize("value_clip", [0.2, None])
def test_reference_passes_gradcheck(value_clip):
    values, old_values, returns, mask = random_tokens(50, seed=3)
    values = values.detach().cpu().double().requires_grad_()
    others = old_values.cpu().double(), returns.cpu().double(), mask.cpu()
    with forced("reference"):
        assert torch.autograd.gradcheck(
            lambda v: ppo_value_loss(v, *others, value_clip=value_clip, denominator=3.0)[0], values
        )


@IMPLEMENTATIONS
def test_masked_tokens_may_hold_anything(implementation):
    values, old_values, returns, mask = random_tokens(700, seed=4)
    poisoned = [torch.where(mask, tensor.detach(), torch.nan) for tensor in (values, old_values, returns)]
    poisoned[0].requires_grad_()
    with forced(implementation):
        clean = run((values, old_values, returns, mask), value_clip=0.2, denominator=9.0)
        dirty = run((*poisoned, mask), value_clip=0.2, denominator=9.0)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1].sums, dirty[1].sums)
    assert torch.equal(clean[2], dirty[2])
    assert (clean[2][~mask] == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_nothing_to_train_on_gives_zero(implementation, num_tokens):
    tensors = random_tokens(num_tokens, keep=-1.0)
    with forced(implementation):
        loss, statistics, gradient = run(tensors, value_clip=0.2, denominator=1.0)
    assert loss.item() == 0.0
    assert statistics.sums.tolist() == [0.0] * len(VALUE_SUMS)
    assert gradient.tolist() == [0.0] * num_tokens


@IMPLEMENTATIONS
@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_is_counted_and_reaches_the_loss(implementation, index):
    tensors = list(random_tokens(20, seed=5, keep=1.1))
    changed = tensors[index].detach().clone()
    changed[7] = math.nan
    tensors[index] = changed.requires_grad_(index == 0)
    with forced(implementation):
        loss, statistics, gradient = run(tensors, value_clip=0.2, denominator=1.0)
    assert statistics.num_nonfinite.item() == 1
    assert loss.isnan()
    assert gradient[torch.arange(20, device=DEVICE) != 7].isfinite().all()


@IMPLEMENTATIONS
def test_micro_batches_add_up_to_the_batch(implementation):
    tensors = random_tokens(900, seed=6)
    options = {"value_clip": 0.2, "denominator": tensors[3].sum()}
    with forced(implementation):
        loss, whole, gradient = run(tensors, **options)
        pieces = []
        for part in (slice(0, 100), slice(100, 101), slice(101, 900)):
            piece = [tensor.detach()[part] for tensor in tensors]
            piece[0].requires_grad_()
            pieces.append(run(piece, **options))
    # fp32 sums in another order.
    torch.testing.assert_close(sum(piece[0] for piece in pieces), loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([piece[2] for piece in pieces]), gradient)
    summed = pieces[0][1] + pieces[1][1] + pieces[2][1]
    torch.testing.assert_close(summed.sums, whole.sums, rtol=1e-5, atol=1e-4)


def test_kernel_gives_the_same_bits_again():
    tensors = random_tokens(1700, seed=7)
    with forced("triton"):
        once, again = (run(tensors, value_clip=0.2, denominator=10.0) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1].sums, again[1].sums)
    assert torch.equal(once[2], again[2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"denominator": -1.0}, "denominator is -1.0, required is a positive number"),
        ({"value_clip": 0.0}, "value_clip is 0.0"),
        ({"value_clip": 0.1, "old_values_T": None}, "needs old_values_T"),
        ({"returns_T": torch.zeros(3)}, r"returns_T has shape \(3,\), required is \[8\]"),
        ({"mask_T": torch.ones(8)}, "mask_T is torch.float32"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    names = ("values_T", "old_values_T", "returns_T", "mask_T")
    tensors = (tensor.cpu() for tensor in random_tokens(8))
    arguments = dict(zip(names, tensors, strict=True)) | {"denominator": 8.0}
    with pytest.raises(ValueError, match=message):
        ppo_value_loss(**(arguments | change))
