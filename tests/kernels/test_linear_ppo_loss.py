"""Losses with their gradients taken in forward, against the same loss on top of the float64 head."""

import functools

import nearest_bf16
import pytest
import torch
import vocabulary_definition as definition
from peak_memory import peak_bytes
from vocabulary_definition import DEVICE, gradients, head_inputs, relative

from glm_rlhf.kernels import linear_loss as sweep
from glm_rlhf.kernels import vocab_head
from glm_rlhf.kernels.launch import forced
from glm_rlhf.kernels.linear_logprob import IGNORE_INDEX, linear_logprob
from glm_rlhf.kernels.linear_ppo_loss import linear_nll_loss, linear_ppo_loss
from glm_rlhf.kernels.policy_loss import ppo_policy_loss
from glm_rlhf.kernels.reference import linear_loss as reference

both = pytest.mark.parametrize("implementation", ["reference", "triton"])
PLAIN = {"clip_low": 0.2, "clip_high": 0.2}
EVERYTHING = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "entropy_coef": 0.05,
    "kl_coef": 0.1,
    "kl_estimator": "k3",
}


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    nearest_bf16.install(monkeypatch)


def ppo_inputs(
    num_rows, vocab_size, width, dtype, settings, *, masked=0.3, seed=0, spread=0.3, device=DEVICE
):
    """Return (hidden_TD, weight_VD, targets_T, arguments); some ratios are inside the clip range."""
    hidden_TD, weight_VD, targets_T, *_ = head_inputs(
        num_rows, vocab_size, width, dtype, seed=seed, num_ignored=0, device=device
    )
    generator = torch.Generator().manual_seed(seed + 1)
    normal_T = lambda: torch.randn(num_rows, generator=generator).to(device)
    uniform_T = lambda: torch.rand(num_rows, generator=generator).to(device)
    logprobs_T = definition.head(hidden_TD, weight_VD, targets_T, 0.8)[0].float()
    arguments = {
        "old_logprobs_T": logprobs_T + spread * normal_T(),
        "advantages_T": normal_T(),
        "mask_T": uniform_T() >= masked,
        "denominator": 0.7 * num_rows + 1,
        **settings,
    }
    if "kl_coef" in settings:
        arguments["ref_logprobs_T"] = logprobs_T + spread * torch.randn(num_rows, generator=generator)
        arguments["importance_weights_T"] = uniform_T() + 0.5
    return hidden_TD, weight_VD, targets_T, arguments


def by_definition(hidden_TD, weight_VD, targets_T, arguments, temperature=0.8):
    """The standalone policy loss on the float64 head: (loss, statistics), gradients."""
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    kept = {}

    def run(hidden_TD, weight_VD):
        logprobs_T, entropy_T = definition.head(hidden_TD, weight_VD, targets_T, temperature)
        loss, kept["statistics"] = ppo_policy_loss(logprobs_T, entropy_T=entropy_T, **exact)
        return (loss,)

    with forced("reference"):
        (loss,), grads = gradients(run, (hidden_TD.double(), weight_VD.double()), [torch.tensor(1.0)])
    return loss, kept["statistics"], grads


def by_sweep(hidden_TD, weight_VD, targets_T, arguments, temperature=0.8, upstream=1.0):
    kept = {}

    def run(hidden_TD, weight_VD):
        loss, kept["statistics"] = linear_ppo_loss(
            hidden_TD, weight_VD, targets_T, temperature=temperature, **arguments
        )
        return (loss,)

    (loss,), grads = gradients(run, (hidden_TD, weight_VD), [torch.tensor(upstream)])
    return loss, kept["statistics"], grads


def gradient_limit(dtype, num_rows):
    """As for linear_logprob; the kept exponentials add a rounding of every probability but the largest."""
    if dtype == torch.float32:
        return 1e-5
    return 2.6e-3 if num_rows > 60 else 2**-7


@both
@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "vocab_size", "width"), [(1, 7, 5), (63, 1000, 48), (200, 257, 67)])
def test_equals_the_policy_loss_on_the_float64_head(
    implementation, settings, dtype, num_rows, vocab_size, width
):
    inputs = ppo_inputs(num_rows, vocab_size, width, dtype, settings)
    if num_rows == 1:
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


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [65024, 151552])
def test_shapes_of_the_models(vocab_size):
    inputs = ppo_inputs(1000, vocab_size, 4096, torch.bfloat16, EVERYTHING)
    loss, _, actual = by_sweep(*inputs)
    exact_loss, _, expected = by_definition(*inputs)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)  # logprobs within 1e-5
    for gradient, exact in zip(actual, expected, strict=True):
        assert relative(gradient, exact) <= gradient_limit(torch.bfloat16, 1000)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_give_what_one_gives(implementation, dtype, monkeypatch):
    inputs = ppo_inputs(400, 300, 24, dtype, EVERYTHING)
    with forced(implementation):
        whole_loss, whole_statistics, whole = by_sweep(*inputs)
        monkeypatch.setattr(vocab_head, "CHUNK_BYTES", 128 * 300 * dtype.itemsize)
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 128 * 300)
        calls = []
        monkeypatch.setattr(sweep, "_row_gradients", counted(sweep._row_gradients, calls))
        loss, statistics, parts = by_sweep(*inputs)
    assert len(calls) == 3
    # float32 sums in another order; the bf16 gradient of the weight is rounded once either way.
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(statistics.sums, whole_statistics.sums, rtol=1e-5, atol=1e-4)
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert torch.equal(parts[0], whole[0])
    assert relative(parts[1], whole[1]) <= limit


def counted(function, calls):
    @functools.wraps(function)
    def run(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    return run


@both
def test_rows_without_gradient_leave_before_the_last_two_products(implementation, monkeypatch):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(60, 300, 24, torch.float32, PLAIN, spread=1.0)
    num_masked = int((~arguments["mask_T"]).sum())
    head = vocab_head if implementation == "triton" else reference
    kept, products = [], []
    monkeypatch.setattr(head, "keep_logits", counted(head.keep_logits, kept))
    monkeypatch.setattr(head, "add_product_", counted(head.add_product_, products))
    with forced(implementation):
        _, statistics, (dhidden_TD, _) = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
    num_clipped = int(statistics.total("num_clipped"))
    assert num_masked > 5
    assert num_clipped > 5
    assert [call[0][0].shape[0] for call in kept] == [60 - num_masked]  # the first product: no masked row
    num_live = 60 - num_masked - num_clipped
    # (out, left, right): dlogits @ weight, then dlogits.T @ hidden.
    assert [call[0][1].shape for call in products] == [(num_live, 300), (300, num_live)]
    assert int((dhidden_TD == 0).all(1).sum()) == num_masked + num_clipped


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
    assert loss == pytest.approx(-6 * 1.2 / arguments["denominator"], rel=1e-6)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradient_scales(implementation, dtype):
    inputs = ppo_inputs(20, 50, 16, dtype, EVERYTHING)
    with forced(implementation):
        plain = by_sweep(*inputs)[2]
        scaled = by_sweep(*inputs, upstream=0.25)[2]
    for one, quarter in zip(plain, scaled, strict=True):
        assert torch.equal(one * 0.25, quarter)  # a power of two rounds nothing


def test_backward_runs_once():
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(5, 20, 8, torch.float32, PLAIN)
    loss, _ = linear_ppo_loss(hidden_TD.requires_grad_(), weight_VD, targets_T, **arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()


@both
def test_frozen_weight_takes_no_product_and_no_gradient(implementation, monkeypatch):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(20, 50, 16, torch.float32, EVERYTHING)
    head = vocab_head if implementation == "triton" else reference
    with forced(implementation):
        expected = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
        products = []
        monkeypatch.setattr(head, "add_product_", counted(head.add_product_, products))
        leaf = hidden_TD.clone().requires_grad_()
        loss, _ = linear_ppo_loss(leaf, weight_VD, targets_T, temperature=0.8, **arguments)
        loss.backward()
    assert len(products) == 1
    assert torch.equal(leaf.grad, expected[2][0])


@both
def test_without_gradients_nothing_is_kept(implementation, monkeypatch):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(20, 50, 16, torch.float32, EVERYTHING)
    head = vocab_head if implementation == "triton" else reference
    with forced(implementation):
        expected = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
        kept = []
        monkeypatch.setattr(head, "keep_logits", counted(head.keep_logits, kept))
        with torch.no_grad():
            loss, statistics = linear_ppo_loss(
                hidden_TD.requires_grad_(), weight_VD, targets_T, temperature=0.8, **arguments
            )
    assert not kept
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-7)  # merged tile by tile
    torch.testing.assert_close(statistics.sums, expected[1].sums, rtol=1e-5, atol=1e-5)


@both
def test_same_inputs_give_the_same_bits(implementation):
    inputs = ppo_inputs(40, 300, 24, torch.bfloat16, EVERYTHING)
    with forced(implementation):
        first, second = by_sweep(*inputs), by_sweep(*inputs)
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[2], second[2], strict=True):
        assert torch.equal(a, b)


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


def test_peak_memory_does_not_depend_on_the_vocabulary_but_for_the_weight_gradient(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 20)  # 4 MB
    peaks = []
    for vocab_size in (8192, 32768):
        hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(
            256, vocab_size, 32, torch.float32, PLAIN, device="cpu"
        )
        hidden_TD.requires_grad_(), weight_VD.requires_grad_()

        def run(inputs=(hidden_TD, weight_VD, targets_T), arguments=arguments):
            linear_ppo_loss(*inputs, **arguments)[0].backward()

        peaks.append(peak_bytes(run) - weight_VD.numel() * weight_VD.element_size())
    # The logits would be 8 and 32 MiB; what is kept is a few buffers of up to 4 MiB either way.
    assert peaks[1] < 1.3 * peaks[0]
    assert max(peaks) < 5 * (4 << 20)


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
        ({"mask_T": torch.ones(5)}, "mask_T is torch.float32"),
        ({"advantages_T": torch.ones(4)}, r"advantages_T has shape \(4,\), required is \[5\]"),
        ({"denominator": 0.0}, "denominator is 0.0"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"kl_coef": 0.1}, "needs ref_logprobs_T"),
        ({"temperature": 0.0}, "a number > 0 required"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(5, 20, 8, torch.float32, PLAIN)
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(hidden_TD, weight_VD, targets_T, **(arguments | change))
