"""logprobs_from_logits, by the reference and by the kernels, against the float64 definition."""

import functools

import pytest
import torch
import vocabulary_definition as definition
from kernel_device import DEVICE
from peak_memory import peak_bytes
from vocabulary_definition import gradients, random_targets, relative

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.lm_head import logprob
from glm_rlhf.kernels.lm_head.logprob import IGNORE_INDEX, logprobs_from_logits, sharded_logprobs_from_logits

both = pytest.mark.parametrize("implementation", ["reference", "triton"])


def logits_inputs(num_rows, vocab_size, dtype=torch.float32, *, seed=0, num_ignored=None, device=DEVICE):
    """Return (logits_TV, targets_T, dlogprobs_T, dentropy_T)."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    targets_T = random_targets(num_rows, vocab_size, generator, num_ignored)
    upstream = torch.randn(2, num_rows, generator=generator).to(device)
    return logits_TV.to(device, dtype), targets_T.to(device), *upstream


def check(implementation, logits_TV, targets_T, upstream, **options):
    temperature = options.get("temperature", 1.0)
    with forced(implementation):
        run = functools.partial(logprobs_from_logits, targets_T=targets_T, **options)
        (logprobs_T, entropy_T), (actual,) = gradients(run, (logits_TV,), upstream)
    run = functools.partial(definition.logprob_and_entropy, targets_T=targets_T, temperature=temperature)
    (exact_logprobs_T, exact_entropy_T), (expected,) = gradients(run, (logits_TV.double(),), upstream)
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    # PERFORMANCE.md: 1e-6, here relative beyond 1: a logprob of -10 has no finer float32 neighbours.
    torch.testing.assert_close(logprobs_T.double(), exact_logprobs_T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy_T.double(), exact_entropy_T, rtol=2e-6, atol=2e-6)
    assert actual.dtype == logits_TV.dtype
    # bf16: the gradient is cut off or rounded once, 2^-7 at most.
    limit = 2e-6 if logits_TV.dtype == torch.float32 else 2**-7
    assert relative(actual, expected) <= limit


SHAPES = [(1, 1), (1, 7), (3, 61), (63, 1000), (1000, 13), (2, 65024), (2, 151552)]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_equals_the_float64_definition(implementation, num_rows, vocab_size, dtype):
    if implementation == "triton" and num_rows == 1000:
        num_rows = 100  # the interpreter runs one program a row
    logits_TV, targets_T, *upstream = logits_inputs(num_rows, vocab_size, dtype)
    check(implementation, logits_TV, targets_T, upstream, temperature=0.7)


@both
@pytest.mark.parametrize("where", ["even columns", "first block", "all but the target", "the target"])
def test_minus_infinity_gives_no_nan(implementation, where):
    vocab_size = 2 * logprob.BLOCK_COLUMNS
    logits_TV, targets_T, *upstream = logits_inputs(5, vocab_size, num_ignored=1)
    targets_T[targets_T >= 0] |= 1  # an odd column, and of the second block
    targets_T[targets_T >= 0] %= logprob.BLOCK_COLUMNS
    targets_T[targets_T >= 0] += logprob.BLOCK_COLUMNS
    rows = torch.arange(5, device=DEVICE)
    if where == "even columns":
        logits_TV[:, ::2] = -torch.inf
    elif where == "first block":
        logits_TV[:, : logprob.BLOCK_COLUMNS] = -torch.inf
    elif where == "all but the target":
        kept_T = logits_TV[rows, targets_T.clamp(min=0)].clone()
        logits_TV.fill_(-torch.inf)
        logits_TV[rows, targets_T.clamp(min=0)] = kept_T
    else:
        logits_TV[rows, targets_T.clamp(min=0)] = -torch.inf
    with forced(implementation):
        run = functools.partial(logprobs_from_logits, targets_T=targets_T, temperature=0.7)
        (logprobs_T, entropy_T), (actual,) = gradients(run, (logits_TV,), upstream)
    # log_softmax's own backward gives NaN here: the probabilities of zero are taken out of the definition.
    finite_TV = torch.where(logits_TV == -torch.inf, -1e4, logits_TV.double())
    run = functools.partial(definition.logprob_and_entropy, targets_T=targets_T, temperature=0.7)
    (exact_logprobs_T, exact_entropy_T), (expected,) = gradients(run, (finite_TV,), upstream)
    if where == "the target":
        exact_logprobs_T = torch.where(targets_T >= 0, -torch.inf, exact_logprobs_T)
    torch.testing.assert_close(logprobs_T.double(), exact_logprobs_T, rtol=1e-6, atol=1e-6)  # float32
    torch.testing.assert_close(entropy_T.double(), exact_entropy_T, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


@both
def test_a_row_without_a_finite_logit_is_nan_as_in_log_softmax(implementation):
    logits_TV = torch.zeros(2, 9, device=DEVICE)
    logits_TV[1] = -torch.inf
    with forced(implementation):
        logprobs_T, entropy_T = logprobs_from_logits(logits_TV, torch.tensor([4, 4], device=DEVICE))
    assert logprobs_T[1].isnan()
    assert entropy_T[1].isnan()
    assert logprobs_T[0].isfinite()


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_logits_are_not_repaired(implementation, bad):
    logits_TV, targets_T, *upstream = logits_inputs(4, 5000, num_ignored=0)
    logits_TV[2, 4500] = bad
    with forced(implementation):
        run = functools.partial(logprobs_from_logits, targets_T=targets_T)
        outputs, (gradient,) = gradients(run, (logits_TV,), upstream)
    for tensor in (*outputs, gradient):
        assert tensor[2].isnan().any()
        assert tensor[[0, 1, 3]].isfinite().all()


@both
@pytest.mark.parametrize("level", [0.0, 3e4, -3e4])
def test_equal_logits_are_uniform(implementation, level):
    logits_TV = torch.full((3, 4999), level, device=DEVICE)
    targets_T = torch.tensor([0, 2500, 4998], device=DEVICE)
    with forced(implementation):
        run = functools.partial(logprobs_from_logits, targets_T=targets_T)
        (logprobs_T, entropy_T), (gradient_TV,) = gradients(run, (logits_TV,), [torch.ones(3), torch.ones(3)])
    expected_T = torch.full_like(logprobs_T, 4999.0).log()
    torch.testing.assert_close(logprobs_T, -expected_T, rtol=1e-6, atol=0)  # float32 of 8.5
    torch.testing.assert_close(entropy_T, expected_T, rtol=1e-6, atol=0)
    assert gradient_TV[0, 1:].abs().max() < 1e-3  # 1 / V, the entropy being at its maximum


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits_keep_their_differences(implementation, dtype):
    logits_TV, targets_T, *upstream = logits_inputs(5, 1009, dtype)
    check(implementation, logits_TV * 3e3, targets_T, upstream)


@both
def test_ignored_rows_are_not_read(implementation):
    logits_TV, targets_T, *upstream = logits_inputs(20, 300, num_ignored=6)
    is_ignored_T = targets_T == IGNORE_INDEX
    logits_TV[is_ignored_T] = torch.nan
    with forced(implementation):
        run = functools.partial(logprobs_from_logits, targets_T=targets_T)
        outputs, (gradient,) = gradients(run, (logits_TV,), upstream)
    for tensor in (*outputs, gradient):
        assert torch.equal(tensor[is_ignored_T], torch.zeros_like(tensor[is_ignored_T]))
        assert tensor[~is_ignored_T].abs().min() > 0


@both
@pytest.mark.parametrize("num_rows", [0, 4])
def test_no_row_to_train_on(implementation, num_rows):
    logits_TV, targets_T, *upstream = logits_inputs(num_rows, 50, num_ignored=num_rows)
    with forced(implementation):
        run = functools.partial(logprobs_from_logits, targets_T=targets_T)
        outputs, (gradient,) = gradients(run, (logits_TV,), upstream)
    for tensor in (*outputs, gradient):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@both
@pytest.mark.parametrize("missing", [0, 1], ids=["entropy alone", "logprob alone"])
def test_gradient_through_one_output(implementation, missing):
    logits_TV, targets_T, *upstream = logits_inputs(9, 40)
    upstream[missing] = None
    check(implementation, logits_TV, targets_T, upstream)


def test_finite_differences():
    logits_TV, targets_T, *_ = logits_inputs(7, 11)
    leaf = logits_TV.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: logprobs_from_logits(x, targets_T, temperature=0.7), leaf)


@both
def test_strided_rows_and_expanded_upstream(implementation):
    logits_TV, targets_T, *_ = logits_inputs(6, 50)
    wide_TV = torch.cat([logits_TV, torch.full_like(logits_TV, torch.nan)], 1)
    leaf = wide_TV.requires_grad_()
    with forced(implementation):
        logprobs_T, _ = logprobs_from_logits(leaf[:, :50], targets_T)
        logprobs_T.sum().backward()  # its gradient has stride 0
        _, (expected,) = gradients(
            lambda x: logprobs_from_logits(x, targets_T), (logits_TV,), [torch.ones(6), None]
        )
    assert torch.equal(leaf.grad[:, :50], expected)
    assert not leaf.grad[:, 50:].any()


@both
def test_gradient_in_place_is_the_same_and_takes_the_memory_of_the_logits(implementation):
    logits_TV, targets_T, *upstream = logits_inputs(8, 5000)
    with forced(implementation):
        _, (expected,) = gradients(
            lambda x: logprobs_from_logits(x, targets_T, temperature=0.7), (logits_TV,), upstream
        )
        leaf = logits_TV.clone().requires_grad_()
        outputs = logprobs_from_logits(leaf, targets_T, temperature=0.7, inplace_gradient=True)
        torch.autograd.backward(outputs, upstream, retain_graph=True)
        assert torch.equal(leaf.grad, expected)
        assert torch.equal(leaf, expected)  # the logits are gone
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(outputs, upstream)


def test_gradient_in_place_allocates_no_second_matrix():
    logits_TV, targets_T, *_ = logits_inputs(256, 8192, torch.bfloat16, device="cpu")

    def run(inplace_gradient):
        leaf = logits_TV.detach().requires_grad_()
        logprobs_from_logits(leaf, targets_T, inplace_gradient=inplace_gradient)[0].sum().backward()

    whole = logits_TV.numel() * 2
    # The rest are a few tiles of 4 MB and the row vectors.
    assert peak_bytes(lambda: run(True)) < 5 * (4 << 20)
    assert peak_bytes(lambda: run(False)) > whole


@both
def test_same_inputs_give_the_same_bits(implementation):
    logits_TV, targets_T, *upstream = logits_inputs(12, 5000, torch.bfloat16)
    with forced(implementation):
        run = functools.partial(logprobs_from_logits, targets_T=targets_T)
        first, second = (gradients(run, (logits_TV,), upstream) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@both
def test_offsets_beyond_2_to_the_31(implementation):
    # Rows 0, 1, 2 start at elements 0, 2^30 and 2^31 of memory that is reserved and mostly never touched:
    # an offset of 32 bits turns negative and faults.
    vocab_size, stride = 300, 1 << 30
    memory = torch.empty(2 * stride + vocab_size, dtype=torch.bfloat16, device=DEVICE)
    logits_TV = memory.as_strided((3, vocab_size), (stride, 1))
    values_TV, targets_T, *upstream = logits_inputs(3, vocab_size, torch.bfloat16, num_ignored=0)
    logits_TV.copy_(values_TV)
    leaf = logits_TV.requires_grad_()
    with forced(implementation):
        outputs = logprobs_from_logits(leaf, targets_T, inplace_gradient=True)
        torch.autograd.backward(outputs, upstream)
        expected, (gradient,) = gradients(
            lambda x: logprobs_from_logits(x, targets_T), (values_TV,), upstream
        )
    for actual, exact in zip((*outputs, leaf.grad), (*expected, gradient), strict=True):
        assert torch.equal(actual.detach(), exact)


@both
def test_shards_add_up(implementation):
    logits_TV, targets_T, *_ = logits_inputs(10, 100)
    parts = []
    for first, last in ((0, 37), (37, 37), (37, 100)):
        with forced(implementation):
            sharded_logprobs_from_logits(
                logits_TV[:, first:last],
                targets_T,
                vocab_size=100,
                vocab_offset=first,
                reduce_statistics=lambda part: parts.append(part) or part,
            )
    merged = functools.reduce(lambda x, y: x.merged(y), parts)
    expected_T, entropy_T = definition.logprob_and_entropy(logits_TV, targets_T)
    is_kept_T = targets_T != IGNORE_INDEX
    logprobs_T, distribution = merged.logprob()
    torch.testing.assert_close(logprobs_T[is_kept_T].double(), expected_T[is_kept_T], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        distribution.entropy_T[is_kept_T].double(), entropy_T[is_kept_T], rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize(
    ("logits_TV", "targets_T", "temperature", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long), 1.0, "flatten batch and sequence"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), 1.0, "flatten batch and sequence"),
        (torch.zeros(4, 3).t(), torch.zeros(3, dtype=torch.long), 1.0, "contiguous"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), -1.0, "1e-06 to"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), float("inf"), "1e-06 to"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), 1e40, "1e-06 to"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), 1e-45, "1e-06 to"),
        (torch.zeros(3, 4), torch.tensor([0, 4, 0]), 1.0, "found 4, required 0 <= target < 4"),
    ],
)
def test_what_does_not_fit_is_named(logits_TV, targets_T, temperature, message):
    with pytest.raises(ValueError, match=message):
        logprobs_from_logits(logits_TV, targets_T, temperature=temperature)
