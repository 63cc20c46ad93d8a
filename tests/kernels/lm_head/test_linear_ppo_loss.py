"""Policy loss and likelihood with gradients taken in forward, against the loss on the float64 head."""

import nearest_bf16
import pytest
import torch
import vocabulary_definition as definition
import wide_tiles
from kernel_device import DEVICE
from policy_sweep import EVERYTHING, PLAIN, by_definition, by_sweep, gradient_limit, ppo_inputs
from vocabulary_definition import gradients, head_inputs, relative

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.lm_head.linear_logprob import IGNORE_INDEX, linear_logprob
from glm_rlhf.kernels.lm_head.linear_ppo_loss import linear_nll_loss, linear_ppo_loss
from glm_rlhf.kernels.rl.policy_loss import ppo_policy_loss

both = pytest.mark.parametrize("implementation", ["reference", "triton"])


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    nearest_bf16.install(monkeypatch)


@both
@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "width"),
    [(1, 7, 5), (3, 61, 64), (63, 1000, 48), (200, 257, 67)],
)
def test_equals_the_policy_loss_on_the_float64_head(
    implementation, settings, dtype, num_rows, vocab_size, width
):
    inputs = ppo_inputs(num_rows, vocab_size, width, dtype, settings)
    if num_rows < 5:
        inputs[-1]["mask_T"].fill_(True)
    with forced(implementation):
        loss, statistics, actual = by_sweep(*inputs)
    exact_loss, exact_statistics, expected = by_definition(*inputs)
    assert loss.dtype == torch.float32
    # Logprobs are within 1e-5; the loss is an average of such.
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.sums, exact_statistics.sums, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(statistics.maxima, exact_statistics.maxima, rtol=1e-4, atol=0)
    if num_rows > 60:
        assert 0.1 < statistics.clip_fraction < 0.9
    for gradient, exact in zip(actual, expected, strict=True):
        assert gradient.dtype == dtype
        assert relative(gradient, exact) <= gradient_limit(dtype, num_rows)


def assert_equals_definition(inputs, limit, rtol=1e-5):
    loss, _, actual = by_sweep(*inputs)
    exact_loss, _, expected = by_definition(*inputs)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=rtol, atol=1e-5)  # logprobs within 1e-5
    for gradient, exact in zip(actual, expected, strict=True):
        assert relative(gradient, exact) <= limit


@both
@pytest.mark.parametrize("vocab_size", [65024, 151552])
def test_vocabularies_of_the_models(implementation, vocab_size, monkeypatch):
    wide_tiles.install(monkeypatch)
    inputs = ppo_inputs(3, vocab_size, 8, torch.bfloat16, EVERYTHING, masked=0.0)
    with forced(implementation):
        assert_equals_definition(inputs, gradient_limit(torch.bfloat16, 3))


@both
@pytest.mark.parametrize("scale", [0.0, 300.0])
def test_equal_and_huge_logits(implementation, scale):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(8, 100, 16, torch.float32, PLAIN, masked=0.0)
    hidden_TD *= scale
    logits_TV = hidden_TD @ weight_VD.t()
    targets_T = torch.cat([logits_TV[:4].argmax(1), logits_TV[4:].argmin(1)])
    logprobs_T, _ = definition.head(hidden_TD, weight_VD, targets_T, 0.8)
    arguments["old_logprobs_T"] = logprobs_T.float() + 0.1
    # Sums of logits of 1e3 carry float32 rounding of 1e-4, tempered logprobs and ratios a few times that.
    tolerance = 2e-3 if scale else 1e-5
    with forced(implementation):
        assert_equals_definition((hidden_TD, weight_VD, targets_T, arguments), tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [65024, 151552])
def test_shapes_of_the_models(vocab_size):
    inputs = ppo_inputs(1000, vocab_size, 4096, torch.bfloat16, EVERYTHING)
    assert_equals_definition(inputs, gradient_limit(torch.bfloat16, 1000))


@both
@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_row_to_train_on(implementation, num_rows):
    inputs = ppo_inputs(num_rows, 30, 16, torch.float32, EVERYTHING, masked=2.0)
    with forced(implementation):
        loss, statistics, grads = by_sweep(*inputs)
    assert loss == 0
    assert statistics.num_tokens == 0
    for gradient in grads:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both
def test_all_rows_clipped(implementation):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(6, 30, 16, torch.float32, PLAIN, masked=0.0)
    arguments["advantages_T"].fill_(1.0)
    arguments["old_logprobs_T"] -= 5.0  # every ratio is above the range, and so is wanted no further
    with forced(implementation):
        loss, statistics, grads = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
    assert loss.item() == pytest.approx(-6 * 1.2 / arguments["denominator"], rel=1e-6)
    assert statistics.clip_fraction == 1
    for gradient in grads:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both
def test_masked_rows_are_never_read(implementation):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(30, 50, 16, torch.float32, EVERYTHING)
    is_masked_T = ~arguments["mask_T"]
    with forced(implementation):
        expected = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
        hidden_TD[is_masked_T] = torch.nan
        targets_T[is_masked_T] = 10**6
        for name in ("old_logprobs_T", "advantages_T", "ref_logprobs_T", "importance_weights_T"):
            arguments[name][is_masked_T] = torch.nan
        actual = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1].sums, expected[1].sums)
    for gradient, exact in zip(actual[2], expected[2], strict=True):
        assert torch.equal(gradient, exact)


@both
def test_ignored_targets_are_masked(implementation):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(20, 50, 16, torch.float32, PLAIN, masked=0.0)
    with forced(implementation):
        arguments["mask_T"][4:9] = False
        expected = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
        arguments["mask_T"][4:9] = True
        targets_T[4:9] = IGNORE_INDEX
        actual = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[2][0], expected[2][0])


@both
def test_nan_is_not_repaired(implementation):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(12, 40, 16, torch.float32, PLAIN, masked=0.0)
    hidden_TD[3, 2] = torch.nan
    with forced(implementation):
        loss, statistics, grads = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
    assert loss.isnan()
    assert statistics.num_nonfinite == 1
    assert grads[0][3].isnan().all()


def test_finite_differences():
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(7, 11, 5, torch.float64, EVERYTHING)
    with forced("reference"):  # kernels compute in fp32
        _, _, grads = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
        step = 1e-6
        for tensor, gradient in zip((hidden_TD, weight_VD), grads, strict=True):
            flat = tensor.view(-1)
            for index in range(flat.numel()):
                losses = []
                for sign in (1, -1):
                    flat[index] += sign * step
                    losses.append(
                        linear_ppo_loss(hidden_TD, weight_VD, targets_T, temperature=0.8, **arguments)[0]
                    )
                    flat[index] -= sign * step
                # float64: 1e-16 / step of rounding; no ratio stands on a corner of the clip.
                slope = ((losses[0] - losses[1]) / (2 * step)).item()
                assert gradient.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_likelihood_equals_cross_entropy(implementation, dtype, is_weighted):
    hidden_TD, weight_VD, targets_T, *_ = head_inputs(90, 200, 32, dtype)
    weights_T = torch.rand(90, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    weights_T = weights_T.to(DEVICE) if is_weighted else None
    kept = {}

    def run(hidden_TD, weight_VD):
        loss, kept["statistics"] = linear_nll_loss(
            hidden_TD, weight_VD, targets_T, weights_T, denominator=torch.tensor(40.0, device=DEVICE)
        )
        return (loss,)

    def expected_run(hidden_TD, weight_VD):
        nll_T = torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.t(), targets_T, reduction="none")
        kept["nll_T"] = nll_T.detach()
        return ((nll_T if weights_T is None else nll_T * weights_T.double()).sum() / 40,)

    with forced(implementation):
        (loss,), actual = gradients(run, (hidden_TD, weight_VD), [torch.tensor(1.0)])
    exact = hidden_TD.double(), weight_VD.double()
    (exact_loss,), expected = gradients(expected_run, exact, [torch.tensor(1.0)])
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)  # logprobs within 1e-5
    for gradient, exact_gradient in zip(actual, expected, strict=True):
        assert relative(gradient, exact_gradient) <= gradient_limit(dtype, 90)
    takes_part_T = targets_T != IGNORE_INDEX
    takes_part_T &= True if weights_T is None else weights_T != 0
    assert kept["statistics"].num_tokens == takes_part_T.sum()
    assert kept["statistics"].nll.item() == pytest.approx(kept["nll_T"][takes_part_T].mean().item(), rel=1e-5)
    assert kept["statistics"].num_nonfinite == 0


def test_equals_linear_logprob_with_the_policy_loss_on_top():
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(50, 80, 16, torch.float32, EVERYTHING)

    def stacked(hidden_TD, weight_VD):
        logprobs_T, entropy_T = linear_logprob(hidden_TD, weight_VD, targets_T, temperature=0.8)
        return (ppo_policy_loss(logprobs_T, entropy_T=entropy_T, **arguments)[0],)

    (loss,), expected = gradients(stacked, (hidden_TD, weight_VD), [torch.tensor(1.0)])
    swept_loss, _, actual = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
    torch.testing.assert_close(swept_loss, loss, rtol=1e-6, atol=1e-6)  # float32
    for gradient, exact in zip(actual, expected, strict=True):
        assert relative(gradient, exact) <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_T": torch.ones(5, device=DEVICE)}, "mask_T is torch.float32"),
        ({"advantages_T": torch.ones(4, device=DEVICE)}, r"advantages_T has shape \(4,\), required is \[5\]"),
        ({"denominator": 0.0}, "denominator is 0.0"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"kl_coef": 0.1}, "needs ref_logprobs_T"),
        ({"temperature": 0.0}, "1e-06 to"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(5, 20, 8, torch.float32, PLAIN)
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(hidden_TD, weight_VD, targets_T, **(arguments | change))
