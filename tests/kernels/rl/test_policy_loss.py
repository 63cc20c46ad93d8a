"""PPO's policy loss, its closed-form gradient and its statistics, against formulas that users know."""

import math

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.rl.policy_loss import ppo_policy_loss
from glm_rlhf.kernels.rl.reference_policy_loss import POLICY_SUMS

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "triton"])
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def random_tokens(num_tokens, *, seed=0, dtype=torch.float32, keep=0.7):
    """Return logprobs and entropy (leaves), old logprobs, advantages, mask, reference logprobs, weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(num_tokens, generator=generator)

    logprobs = normal() - 2
    tensors = {
        "logprobs_T": logprobs,
        "old_logprobs_T": logprobs + normal(0.3),
        "advantages_T": normal(),
        "entropy_T": normal().abs(),
        "ref_logprobs_T": logprobs + normal(0.4),
        "importance_weights_T": normal().abs(),
    }
    tensors = {name: tensor.to(dtype).to(DEVICE) for name, tensor in tensors.items()}
    tensors["mask_T"] = (torch.rand(num_tokens, generator=generator) < keep).to(DEVICE)
    tensors["logprobs_T"].requires_grad_()
    tensors["entropy_T"].requires_grad_()
    return tensors


def run(tensors, **options):
    """Return loss, statistics and the gradients to logprobs and (if it was used) entropy."""
    loss, statistics = ppo_policy_loss(**tensors, **options)
    leaves = [tensors["logprobs_T"], tensors["entropy_T"]]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), statistics, gradients


def in_fp64(tensors):
    return {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


def naive_terms(tensors, *, clip_low, clip_high, dual_clip=None):
    """The clipped term as verl's `compute_policy_loss` has it, all tokens, fp64, plain autograd."""
    negative_kl = (tensors["logprobs_T"] - tensors["old_logprobs_T"]).clamp(-20.0, 20.0)
    ratio, advantages = negative_kl.exp(), tensors["advantages_T"]
    losses = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return losses, ratio, negative_kl


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 63, 1000])
def test_equals_the_naive_loss_in_fp64(implementation, dtype, num_tokens):
    tensors = random_tokens(num_tokens, dtype=dtype, seed=num_tokens)
    options = {"dual_clip": 1.3, "entropy_coef": 0.01, "kl_coef": 0.1, "denominator": 37.0} | CLIP
    with forced(implementation):
        loss, statistics, gradients = run(tensors, **options)

    exact = in_fp64(tensors)
    terms, ratio, negative_kl = naive_terms(exact, dual_clip=1.3, **CLIP)
    difference = exact["logprobs_T"] - exact["ref_logprobs_T"]
    objective = exact["importance_weights_T"] * terms - 0.01 * exact["entropy_T"]
    objective = objective + 0.1 * (torch.exp(-difference) - 1 + difference)
    mask = tensors["mask_T"]
    expected_loss = (objective * mask).sum() / 37.0
    expected = torch.autograd.grad(expected_loss, [exact["logprobs_T"], exact["entropy_T"]])

    # One fp32 rounding a step over terms of order one.
    torch.testing.assert_close(loss.double(), expected_loss.detach(), rtol=2e-6, atol=1e-6)
    for gradient, exact_gradient in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        # bf16 gradients are rounded once: 2⁻⁹ relative.
        rtol = 2e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=rtol, atol=1e-8)
    unclipped = -exact["advantages_T"] * ratio
    bound = -exact["advantages_T"] * ratio.clamp(0.8, 1.28)
    count = max(int(mask.sum()), 1)
    for actual, wanted in (
        (statistics.num_tokens, mask.sum()),
        (statistics.policy_loss, (terms * exact["importance_weights_T"] * mask).sum() / count),
        (statistics.entropy, (exact["entropy_T"] * mask).sum() / count),
        (statistics.clip_fraction, ((bound > unclipped) & mask).sum() / count),
        (statistics.approximate_kl_k1, (-negative_kl * mask).sum() / count),
        (statistics.approximate_kl, ((ratio - 1 - negative_kl) * mask).sum() / count),
        (statistics.kl_reference, ((torch.exp(-difference) - 1 + difference) * mask).sum() / count),
        (statistics.ratio_mean, (ratio * mask).sum() / count),
        (statistics.num_nonfinite, torch.tensor(0.0)),
    ):
        # fp32 sums of at most 1000 terms of order one.
        torch.testing.assert_close(
            actual.cpu().double(), wanted.detach().cpu().double(), rtol=1e-5, atol=1e-6
        )
    if mask.any():
        torch.testing.assert_close(
            statistics.ratio_max.double(), ratio[mask].max().detach(), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            statistics.ratio_min.double(), ratio[mask].min().detach(), rtol=1e-6, atol=0
        )


@IMPLEMENTATIONS
def test_hand_worked_clipping(implementation):
    """clip 0.5 both ways, dual clip 3; ratios 2, 2, ¼, ¼, 4, 1 against advantages 1, -1, 1, -1, -1, 2.

    A=1, ρ=2: -1.5 clipped. A=-1, ρ=2: 2 free. A=1, ρ=¼: -¼ free. A=-1, ρ=¼: ½ clipped.
    A=-1, ρ=4: min(4, 3) = 3 held. A=2, ρ=1: -2 free. Sum: 1.75; the gradient of a free term is the term.
    """
    ratio = torch.tensor([2.0, 2.0, 0.25, 0.25, 4.0, 1.0], dtype=torch.float64)
    logprobs = ratio.log().float().to(DEVICE).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 2.0], device=DEVICE)
    mask = torch.ones(6, dtype=torch.bool, device=DEVICE)
    with forced(implementation):
        loss, statistics = ppo_policy_loss(
            logprobs,
            torch.zeros(6, device=DEVICE),
            advantages,
            mask,
            clip_low=0.5,
            clip_high=0.5,
            dual_clip=3.0,
            denominator=2.0,
        )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # exp(log ρ) in fp32 is ρ to two roundings.
    assert loss.item() == pytest.approx(1.75 / 2, rel=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, 1.0, -0.125, 0.0, 0.0, -1.0], rel=1e-6)
    assert statistics.total("num_clipped").item() == 2
    assert statistics.total("num_dual_clipped").item() == 1
    assert statistics.clip_fraction.item() == pytest.approx(2 / 6)
    assert statistics.ratio_max.item() == pytest.approx(4.0)
    assert statistics.ratio_min.item() == pytest.approx(0.25)


@IMPLEMENTATIONS
def test_equals_trl_at_symmetric_clip(implementation):
    """TRL's PPOTrainer: masked mean of max(-A ρ, -A clamp(ρ)), clip fraction, mean ratio."""
    tensors = random_tokens(200, seed=1)
    for name in ("ref_logprobs_T", "importance_weights_T"):
        del tensors[name]
    mask = tensors["mask_T"]
    with forced(implementation):
        loss, statistics, (gradient, _) = run(
            tensors, clip_low=0.2, clip_high=0.2, denominator=mask.sum().float()
        )
    exact = in_fp64(tensors)
    ratio = torch.exp(exact["logprobs_T"] - exact["old_logprobs_T"])
    losses = -exact["advantages_T"] * ratio
    clipped_losses = -exact["advantages_T"] * torch.clamp(ratio, 0.8, 1.2)
    expected = torch.max(losses, clipped_losses)[mask].mean()
    (expected_gradient,) = torch.autograd.grad(expected, exact["logprobs_T"])
    # fp32 against fp64.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-6, atol=1e-9)
    clip_fraction = (clipped_losses > losses)[mask].double().mean()
    assert statistics.clip_fraction.item() == pytest.approx(clip_fraction.item(), rel=1e-6)
    assert 0.05 < clip_fraction < 0.6  # the case does clip, and does not only clip
    assert statistics.ratio_mean.item() == pytest.approx(ratio[mask].mean().item(), rel=1e-6)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_reference_passes_gradcheck(kl_estimator):
    tensors = in_fp64(random_tokens(40, seed=2))

    def loss_of(logprobs_T, entropy_T):
        changed = tensors | {"logprobs_T": logprobs_T, "entropy_T": entropy_T}
        options = {"dual_clip": 1.3, "entropy_coef": 0.3, "kl_coef": 0.2, "denominator": 7.0} | CLIP
        with forced("reference"):
            return ppo_policy_loss(**changed, kl_estimator=kl_estimator, **options)[0]

    assert torch.autograd.gradcheck(loss_of, (tensors["logprobs_T"], tensors["entropy_T"]))


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_kernel_gradient_equals_finite_differences(kl_estimator):
    """The loss is differenced in fp64 by the definition; the gradient is the kernel's closed form."""
    tensors = random_tokens(64, seed=3)
    options = {"dual_clip": 1.3, "entropy_coef": 0.3, "kl_coef": 0.2, "denominator": 5.0} | CLIP
    with forced("triton"):
        _, _, (gradient, entropy_gradient) = run(tensors, kl_estimator=kl_estimator, **options)
    exact = {name: tensor.detach() for name, tensor in in_fp64(tensors).items()}
    step = 1e-6
    for name, actual in (("logprobs_T", gradient), ("entropy_T", entropy_gradient)):
        numeric = torch.zeros_like(exact[name])
        for token in range(64):
            losses = []
            for sign in (1, -1):
                moved = exact[name].clone()
                moved[token] += sign * step
                with forced("reference"):
                    losses.append(
                        ppo_policy_loss(**(exact | {name: moved}), kl_estimator=kl_estimator, **options)[0]
                    )
            numeric[token] = (losses[0] - losses[1]) / (2 * step)
        # Central differences are good to step² and to 1e-16 / step = 1e-10; the kernel is fp32.
        torch.testing.assert_close(actual.double(), numeric, rtol=1e-5, atol=1e-8)


@IMPLEMENTATIONS
def test_gradient_flows_on_the_bound_itself(implementation):
    """A ratio exactly on the bound is not outside: the gradient is that of the free term."""
    logprobs = torch.zeros(2, device=DEVICE, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], device=DEVICE)
    mask = torch.ones(2, dtype=torch.bool, device=DEVICE)
    with forced(implementation):
        loss, statistics = ppo_policy_loss(
            logprobs,
            torch.zeros(2, device=DEVICE),
            advantages,
            mask,
            clip_low=0.0,
            clip_high=0.0,
            denominator=1,
        )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [-1.0, 1.0]
    assert statistics.clip_fraction.item() == 0


@IMPLEMENTATIONS
def test_masked_tokens_may_hold_anything(implementation):
    tensors = random_tokens(700, seed=4)
    mask = tensors["mask_T"]
    poisoned = {
        name: torch.where(mask, tensor.detach(), torch.nan).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
        if name != "mask_T"
    } | {"mask_T": mask}
    options = {"dual_clip": 1.3, "entropy_coef": 0.01, "kl_coef": 0.1, "denominator": 100.0} | CLIP
    with forced(implementation):
        clean, dirty = run(tensors, **options), run(poisoned, **options)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1].sums, dirty[1].sums)
    assert torch.equal(clean[1].maxima, dirty[1].maxima)
    for left, right in zip(clean[2], dirty[2], strict=True):
        assert torch.equal(left, right)
        assert (left[~mask] == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_nothing_to_train_on_gives_zero(implementation, num_tokens):
    tensors = random_tokens(num_tokens, keep=-1.0)
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, "denominator": 10.0} | CLIP
    with forced(implementation):
        loss, statistics, (gradient, _) = run(tensors, **options)
    assert loss.item() == 0.0
    assert statistics.sums.tolist() == [0.0] * len(POLICY_SUMS)
    assert statistics.clip_fraction.item() == 0.0
    assert statistics.ratio_max.item() == -math.inf
    assert statistics.ratio_min.item() == math.inf
    assert gradient.tolist() == [0.0] * num_tokens


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with NumPy
@IMPLEMENTATIONS
@pytest.mark.parametrize("name", ["logprobs_T", "old_logprobs_T", "advantages_T", "importance_weights_T"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_nonfinite_tokens_are_counted(implementation, name, number):
    tensors = random_tokens(20, seed=5, keep=1.1)
    changed = tensors[name].detach().clone()
    changed[7] = number
    tensors[name] = changed.requires_grad_(name == "logprobs_T")
    with forced(implementation):
        loss, statistics, (gradient, _) = run(tensors, denominator=20.0, **CLIP)
    assert statistics.num_nonfinite.item() == 1
    if math.isnan(number):
        assert loss.isnan()
    others = torch.arange(20, device=DEVICE) != 7
    assert gradient[others].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with NumPy
@IMPLEMENTATIONS
def test_overflowing_ratio_of_a_clipped_token_has_gradient_zero(implementation):
    """ρ = exp(100) = inf in fp32: with A > 0 the bound holds, and 0 · inf must not make a NaN of it."""
    logprobs = torch.tensor([0.0], device=DEVICE, requires_grad=True)
    old_logprobs = torch.tensor([-100.0], device=DEVICE)
    mask = torch.ones(1, dtype=torch.bool, device=DEVICE)
    with forced(implementation):
        loss, _ = ppo_policy_loss(
            logprobs, old_logprobs, torch.ones(1, device=DEVICE), mask, denominator=1, **CLIP
        )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-1.28, rel=1e-6)
    assert gradient.item() == 0.0


@IMPLEMENTATIONS
def test_watched_entropy_and_kl_do_not_touch_the_loss(implementation):
    """With coefficients of zero they are statistics alone, even where they are infinite."""
    tensors = random_tokens(20, seed=6, keep=1.1)
    plain = {name: tensors[name] for name in ("logprobs_T", "old_logprobs_T", "advantages_T", "mask_T")}
    with torch.no_grad():
        tensors["ref_logprobs_T"][3] = -math.inf
        tensors["entropy_T"][4] = math.inf
    del tensors["importance_weights_T"]
    with forced(implementation):
        watched, statistics, (gradient, _) = run(tensors, denominator=20.0, **CLIP)
        loss, _ = ppo_policy_loss(**plain, denominator=20.0, **CLIP)
    (expected,) = torch.autograd.grad(loss, plain["logprobs_T"])
    assert torch.equal(watched, loss)
    assert torch.equal(gradient, expected)
    assert statistics.entropy.item() == math.inf


@IMPLEMENTATIONS
def test_micro_batches_add_up_to_the_batch(implementation):
    """Losses and gradients over a common denominator, and statistics, are those of the whole."""
    tensors = random_tokens(900, seed=7)
    denominator = tensors["mask_T"].sum()
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, "denominator": denominator} | CLIP
    parts = [slice(0, 100), slice(100, 101), slice(101, 900)]
    with forced(implementation):
        loss, whole, (gradient, _) = run(tensors, **options)
        pieces = []
        for part in parts:
            piece = {
                name: tensor.detach()[part].requires_grad_(tensor.requires_grad)
                for name, tensor in tensors.items()
            }
            pieces.append(run(piece, **options))
    # fp32 sums in another order.
    torch.testing.assert_close(sum(piece[0] for piece in pieces), loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([piece[2][0] for piece in pieces]), gradient)
    summed = pieces[0][1] + pieces[1][1] + pieces[2][1]
    torch.testing.assert_close(summed.sums, whole.sums, rtol=1e-5, atol=1e-4)
    assert torch.equal(summed.maxima, whole.maxima)


@IMPLEMENTATIONS
def test_first_step_kl_keeps_its_digits(implementation):
    """Log-ratios of 1e-6, as recomputed logprobs have: naive fp32 gives up to 6e-8 where 5e-13 is right."""
    generator = torch.Generator().manual_seed(8)
    noise = 1e-6 * torch.randn(512, generator=generator)
    logprobs = noise.to(DEVICE).requires_grad_()
    zeros = torch.zeros(512, device=DEVICE)
    mask = torch.ones(512, dtype=torch.bool, device=DEVICE)
    with forced(implementation):
        _, statistics = ppo_policy_loss(logprobs, zeros, zeros, mask, denominator=512, **CLIP)
    expected = (noise.double() ** 2 / 2).mean().item()
    assert statistics.approximate_kl.item() == pytest.approx(expected, rel=1e-5)


def test_kernel_gives_the_same_bits_again():
    tensors = random_tokens(1700, seed=9)
    options = {"dual_clip": 2.0, "entropy_coef": 0.01, "kl_coef": 0.1, "denominator": 10.0} | CLIP
    with forced("triton"):
        once, again = (run(tensors, **options) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1].sums, again[1].sums)
    assert torch.equal(once[2][0], again[2][0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"denominator": 0}, "denominator is 0, required is a positive number"),
        ({"denominator": torch.ones(2)}, r"denominator has shape \(2,\)"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0"),
        ({"entropy_coef": 0.1, "entropy_T": None}, "needs entropy_T"),
        ({"kl_coef": 0.1, "ref_logprobs_T": None}, "needs ref_logprobs_T"),
        ({"kl_estimator": "k0"}, "k1, k2, k3"),
        ({"advantages_T": torch.zeros(3)}, r"advantages_T has shape \(3,\), required is \[8\]"),
        ({"mask_T": torch.ones(8)}, "mask_T is torch.float32"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {name: tensor.cpu() for name, tensor in random_tokens(8).items()}
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(**(arguments | {"denominator": 8.0} | CLIP | change))
