"""linear_logprob, by the reference and by the kernels, against the float64 definition."""

import functools
import itertools

import nearest_bf16
import pytest
import torch
import vocabulary_definition as definition
import wide_tiles
from kernel_device import DEVICE
from peak_memory import peak_bytes
from vocabulary_definition import gradients, head_inputs, relative

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.lm_head import reference_linear_logprob as reference
from glm_rlhf.kernels.lm_head import vocab_head
from glm_rlhf.kernels.lm_head.linear_logprob import (
    IGNORE_INDEX,
    linear_logprob,
    shard_gradients,
    shard_statistics,
)

both = pytest.mark.parametrize("implementation", ["reference", "triton"])


def gradient_limit(dtype, num_rows):
    """Frobenius, relative. float32: sums of up to 1000 terms. bf16: d(logits) and the gradient are rounded
    once each, 1.7e-3 a rounding on average, and 1.2 x 2e-3 is what the accuracy target allows; the few
    gradients of a few rows may all be rounded by the most there is, 2^-8.
    """
    if dtype == torch.float32:
        return 1e-5
    return 2.4e-3 if num_rows > 60 else 2**-8


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    nearest_bf16.install(monkeypatch)


def check(implementation, num_rows, vocab_size, width, dtype, temperature=1.0, **options):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(num_rows, vocab_size, width, dtype, **options)
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T, temperature=temperature)
        (logprobs_T, entropy_T), actual = gradients(run, (hidden_TD, weight_VD), upstream)
    run = functools.partial(definition.head, targets_T=targets_T, temperature=temperature)
    exact = hidden_TD.double(), weight_VD.double()
    (exact_logprobs_T, exact_entropy_T), expected = gradients(run, exact, upstream)
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    # PERFORMANCE.md: logprob 1e-4 at most and 1e-5 on average, entropy 2e-4, bf16 inputs being exact.
    torch.testing.assert_close(logprobs_T.double(), exact_logprobs_T, rtol=0, atol=1e-4)
    assert (logprobs_T - exact_logprobs_T).abs().mean() <= 1e-5
    torch.testing.assert_close(entropy_T.double(), exact_entropy_T, rtol=0, atol=2e-4)
    for gradient, exact_gradient in zip(actual, expected, strict=True):
        assert gradient.dtype == dtype
        assert relative(gradient, exact_gradient) <= gradient_limit(dtype, num_rows)


SHAPES = [(1, 7, 5), (3, 61, 64), (63, 1000, 48), (131, 257, 67), (1000, 63, 8)]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "vocab_size", "width"), SHAPES)
def test_equals_the_float64_definition(implementation, num_rows, vocab_size, width, dtype):
    check(implementation, num_rows, vocab_size, width, dtype, temperature=0.7)


@both
@pytest.mark.parametrize("vocab_size", [65024, 151552])
def test_vocabularies_of_the_models(implementation, vocab_size, monkeypatch):
    wide_tiles.install(monkeypatch)
    check(implementation, 3, vocab_size, 8, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [65024, 151552])
def test_shapes_of_the_models(vocab_size):
    check("triton", 1000, vocab_size, 4096, torch.bfloat16)


def test_weight_of_many_tiles_in_float32():
    check("reference", 600, 3 * reference.TILE_COLUMNS - 5, 8, torch.float32)


@pytest.mark.parametrize("shape", [vocab_head.BLACKWELL, vocab_head.PORTABLE], ids=["blackwell", "portable"])
def test_tiles_of_other_devices(shape, monkeypatch):
    monkeypatch.setattr(vocab_head, "tile_shape", lambda hidden, weight: shape)
    check("triton", 131, 513, 72, torch.bfloat16, temperature=1.3)


def test_backward_in_slices_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(vocab_head, "CHUNK_BYTES", 64 * 2 * 256)
    check("triton", 64, 600, 16, torch.bfloat16, num_ignored=0)


@both
@pytest.mark.parametrize("missing", [0, 1], ids=["entropy alone", "logprob alone"])
def test_gradient_through_one_output(implementation, missing):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(9, 40, 16, torch.float32)
    upstream[missing] = None
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T)
        _, actual = gradients(run, (hidden_TD, weight_VD), upstream)
    exact = hidden_TD.double(), weight_VD.double()
    _, expected = gradients(functools.partial(definition.head, targets_T=targets_T), exact, upstream)
    for gradient, exact_gradient in zip(actual, expected, strict=True):
        assert relative(gradient, exact_gradient) <= 1e-5  # float32 rounding


def test_finite_differences():
    hidden_TD, weight_VD, targets_T, *_ = head_inputs(7, 11, 5, torch.float64)
    leaves = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets_T, temperature=0.7), leaves)


@both
def test_ignored_rows_are_never_read(implementation):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(20, 50, 16, torch.float32, num_ignored=6)
    is_ignored_T = targets_T == IGNORE_INDEX
    hidden_TD[is_ignored_T] = torch.nan
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T)
        outputs, (dhidden_TD, dweight_VD) = gradients(run, (hidden_TD, weight_VD), upstream)
    for tensor in (*outputs, dhidden_TD):
        assert torch.equal(tensor[is_ignored_T], torch.zeros_like(tensor[is_ignored_T]))
        assert tensor[~is_ignored_T].abs().min() > 0
    assert dweight_VD.isfinite().all()


@both
@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_row_to_train_on(implementation, num_rows):
    inputs = head_inputs(num_rows, 30, 16, torch.float32, num_ignored=num_rows)
    hidden_TD, weight_VD, targets_T, *upstream = inputs
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T)
        outputs, (dhidden_TD, dweight_VD) = gradients(run, (hidden_TD, weight_VD), upstream)
    for tensor in (*outputs, dhidden_TD, dweight_VD):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@both
def test_rows_without_an_upstream_gradient_are_skipped_in_backward(implementation):
    hidden_TD, weight_VD, targets_T, dlogprobs_T, _ = head_inputs(12, 40, 16, torch.float32, num_ignored=0)
    hidden_TD[3] = torch.inf  # its logits are NaN
    dlogprobs_T[3] = 0
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T)
        (logprobs_T, _), actual = gradients(run, (hidden_TD, weight_VD), [dlogprobs_T, None])
    assert logprobs_T[3].isnan()
    assert all(gradient.isfinite().all() for gradient in actual)


@both
def test_nan_is_not_repaired(implementation):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(12, 40, 16, torch.float32, num_ignored=0)
    hidden_TD[3, 2] = torch.nan
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T)
        outputs, (dhidden_TD, _) = gradients(run, (hidden_TD, weight_VD), upstream)
    for tensor in (*outputs, dhidden_TD):
        assert tensor[3].isnan().all()
        assert tensor[torch.arange(12, device=DEVICE) != 3].isfinite().all()


@both
def test_equal_logits_are_uniform(implementation):
    hidden_TD = torch.full((4, 16), 25.0, device=DEVICE)  # every logit is 10 000
    weight_VD = torch.full((1000, 16), 25.0, device=DEVICE)
    with forced(implementation):
        logprobs_T, entropy_T = linear_logprob(hidden_TD, weight_VD, torch.arange(4, device=DEVICE))
    expected_T = torch.full_like(logprobs_T, 1000.0).log()
    # The logits are exact in float32 and cancel; what is left is the logarithm's rounding.
    torch.testing.assert_close(logprobs_T, -expected_T, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy_T, expected_T, rtol=1e-6, atol=0)


@both
def test_logits_of_minus_infinity_take_no_part(implementation):
    """Whole tiles of them, the first ones, and every third behind: what is left is the head without them."""
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(7, 601, 16, torch.float32, num_ignored=0)
    hidden_TD.abs_().add_(0.1)  # times −∞ it is −∞ in every term
    is_possible_V = torch.arange(601, device=DEVICE) >= 300
    is_possible_V[300::3] = False
    possible_V = is_possible_V.nonzero()[:, 0]
    targets_T %= len(possible_V)
    run = functools.partial(definition.head, targets_T=targets_T)
    exact = hidden_TD.double(), weight_VD[possible_V].double()
    (exact_logprobs_T, exact_entropy_T), (_, expected) = gradients(run, exact, upstream)
    weight_VD[~is_possible_V] = -torch.inf
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=possible_V[targets_T])
        (logprobs_T, entropy_T), (_, dweight_VD) = gradients(run, (hidden_TD, weight_VD), upstream)
    torch.testing.assert_close(logprobs_T.double(), exact_logprobs_T, rtol=1e-6, atol=1e-5)  # float32
    torch.testing.assert_close(entropy_T.double(), exact_entropy_T, rtol=1e-6, atol=1e-5)
    assert relative(dweight_VD[possible_V], expected) <= gradient_limit(torch.float32, 7)
    # Only of the weight: in the product that makes dhidden, zero meets the weight's own −∞.
    assert torch.equal(dweight_VD[~is_possible_V], torch.zeros_like(dweight_VD[~is_possible_V]))


@both
def test_huge_logits_stay_finite(implementation):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(8, 100, 16, torch.float32, num_ignored=0)
    hidden_TD *= 1e4
    targets_T = (hidden_TD @ weight_VD.t()).argmax(1)
    targets_T[0] = (hidden_TD @ weight_VD.t())[0].argmin()
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T)
        (logprobs_T, entropy_T), actual = gradients(run, (hidden_TD, weight_VD), upstream)
    exact_T = definition.head(hidden_TD, weight_VD, targets_T)[0]
    # Logits of 1e5 carry float32 rounding of 0.01.
    torch.testing.assert_close(logprobs_T.double(), exact_T, rtol=1e-6, atol=0.05)
    assert (entropy_T >= 0).all()
    assert (entropy_T < 1e-3).all()
    assert all(gradient.isfinite().all() for gradient in actual)


@both
def test_same_inputs_give_the_same_bits(implementation):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(40, 300, 24, torch.bfloat16)
    with forced(implementation):
        run = functools.partial(linear_logprob, targets_T=targets_T)
        first, second = (gradients(run, (hidden_TD, weight_VD), upstream) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@both
def test_strided_inputs_and_int32_targets(implementation):
    hidden_TD, weight_VD, targets_T, *_ = head_inputs(10, 40, 16, torch.float32)
    with forced(implementation):
        plain = linear_logprob(hidden_TD, weight_VD, targets_T)
        strided = linear_logprob(
            hidden_TD.repeat(1, 2)[:, :16], weight_VD.t().contiguous().t(), targets_T.int()
        )
    for a, b in zip(plain, strided, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # another order of summation at most


@both
def test_changing_the_entropy_in_place_leaves_backward_alone(implementation):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(6, 40, 16, torch.float32)

    def run(hidden_TD, weight_VD):
        logprobs_T, entropy_T = linear_logprob(hidden_TD, weight_VD, targets_T)
        return logprobs_T, entropy_T.mul_(1.0)

    with forced(implementation):
        _, changed = gradients(run, (hidden_TD, weight_VD), upstream)
        _, plain = gradients(lambda h, w: linear_logprob(h, w, targets_T), (hidden_TD, weight_VD), upstream)
    assert torch.equal(changed[0], plain[0])


@both
def test_shards_add_up(implementation):
    hidden_TD, weight_VD, targets_T, *upstream = head_inputs(30, 100, 16, torch.float32, num_ignored=0)
    cuts = [0, 37, 37, 100]  # one shard is empty
    with forced(implementation):
        parts = [
            shard_statistics(hidden_TD, weight_VD[a:b], targets_T, vocab_offset=a, temperature=0.7)
            for a, b in itertools.pairwise(cuts)
        ]
        logprobs_T, distribution = functools.reduce(lambda x, y: x.merged(y), parts).logprob()
        gradient_parts = [
            shard_gradients(
                hidden_TD,
                weight_VD[a:b],
                targets_T,
                distribution,
                *upstream,
                vocab_offset=a,
                temperature=0.7,
            )
            for a, b in itertools.pairwise(cuts)
        ]
        run = functools.partial(linear_logprob, targets_T=targets_T, temperature=0.7)
        (whole_T, entropy_T), (dhidden_TD, dweight_VD) = gradients(run, (hidden_TD, weight_VD), upstream)
    # The same numbers, added in another order.
    torch.testing.assert_close(logprobs_T, whole_T, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(distribution.entropy_T, entropy_T, rtol=1e-5, atol=2e-6)
    assert relative(sum(part[0] for part in gradient_parts), dhidden_TD) <= 1e-6
    assert relative(torch.cat([part[1] for part in gradient_parts]), dweight_VD) <= 1e-6


def test_peak_memory_does_not_depend_on_the_vocabulary_but_for_the_weight_gradient():
    peaks = []
    for vocab_size in (8192, 32768):
        inputs = head_inputs(512, vocab_size, 32, torch.float32, num_ignored=0, device="cpu")
        hidden_TD, weight_VD, targets_T, *_ = inputs
        hidden_TD.requires_grad_(), weight_VD.requires_grad_()

        def run(hidden_TD=hidden_TD, weight_VD=weight_VD, targets_T=targets_T):
            logprobs_T, entropy_T = linear_logprob(hidden_TD, weight_VD, targets_T)
            (logprobs_T.sum() + entropy_T.sum()).backward()

        peaks.append(peak_bytes(run) - weight_VD.numel() * weight_VD.element_size())
    # Equal but for a few bytes of bookkeeping; the logits themselves would be 16 and 64 MiB.
    assert abs(peaks[1] - peaks[0]) < 4096
    assert peaks[0] < 16e6


@pytest.mark.parametrize("target", [-1, 40, -101])
def test_target_out_of_range_is_refused(target):
    with pytest.raises(ValueError, match=rf"found {target}, required 0 <= target < 40"):
        linear_logprob(torch.zeros(2, 8), torch.zeros(40, 8), torch.tensor([3, target]))


@pytest.mark.parametrize(
    ("hidden_shape", "weight_shape", "num_targets", "dtype", "temperature", "message"),
    [
        ((2, 3, 8), (40, 8), 2, torch.float32, 1.0, "flatten batch and sequence"),
        ((2, 8), (40, 9), 2, torch.float32, 1.0, r"\[T, D\] and \[V, D\] required"),
        ((2, 8), (40, 8), 3, torch.float32, 1.0, "one target per row"),
        ((2, 8), (40, 8), 2, torch.bfloat16, 1.0, "convert one of them"),
        ((2, 8), (40, 8), 2, torch.float32, 0.0, "1e-06 to"),
        ((2, 8), (40, 8), 2, torch.float32, float("inf"), "1e-06 to"),
        ((2, 8), (40, 8), 2, torch.float32, 1e40, "1e-06 to"),
        ((2, 8), (40, 8), 2, torch.float32, 1e-45, "1e-06 to"),
        ((2, 8), (40, 8), 2, torch.float32, float("nan"), "1e-06 to"),
    ],
)
def test_what_does_not_fit_is_named(hidden_shape, weight_shape, num_targets, dtype, temperature, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(
            torch.zeros(hidden_shape),
            torch.zeros(weight_shape, dtype=dtype),
            torch.zeros(num_targets, dtype=torch.long),
            temperature=temperature,
        )
