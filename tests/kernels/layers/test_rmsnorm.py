"""RMSNorm against its float64 definition, GLM's own module and finite differences."""

import pytest
import torch
from kernel_device import DEVICE
from transformers.models.glm.modeling_glm import GlmRMSNorm

from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.layers.rmsnorm import add_rms_norm, rms_norm

EPSILON = 1e-5
SHAPES = [(1, 1), (1, 63), (3, 1000), (63, 128), (101, 97), (300, 16)]
IMPLEMENTATIONS = ["reference", "triton"]


def definition(hidden_TD, weight_D):
    return hidden_TD * torch.rsqrt(hidden_TD.square().mean(-1, keepdim=True) + EPSILON) * weight_D


def random_inputs(num_rows, hidden_size, dtype, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
    return draw(num_rows, hidden_size), draw(num_rows, hidden_size), draw(hidden_size)


def gradients_of(outputs, output_grads, inputs):
    return torch.autograd.grad(outputs, inputs, output_grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_rows, hidden_size", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_equal_the_float64_definition(num_rows, hidden_size, dtype, implementation):
    hidden_TD, _, weight_D = random_inputs(num_rows, hidden_size, dtype)
    generator = torch.Generator().manual_seed(1)
    grad_TD = torch.randn(num_rows, hidden_size, generator=generator).to(DEVICE, dtype)
    with launch.forced(implementation):
        normed_TD = rms_norm(hidden_TD, weight_D, epsilon=EPSILON)
        actual = gradients_of(normed_TD, grad_TD, (hidden_TD, weight_D))

    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden_TD, weight_D)]
    exact_TD = definition(*exact_inputs)
    exact = gradients_of(exact_TD, grad_TD.double(), exact_inputs)

    # fp32: a few roundings. bf16: two of 2^-8, which Triton's interpreter makes by truncation (2^-7).
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2e-3}
    torch.testing.assert_close(normed_TD.double(), exact_TD, **tolerance)
    torch.testing.assert_close(actual[0].double(), exact[0], **tolerance)
    # The sum over rows cancels: its error scales with the size of the terms, not of the result.
    row_scale = num_rows**0.5
    torch.testing.assert_close(
        actual[1].double(), exact[1], rtol=tolerance["rtol"], atol=4 * tolerance["atol"] * row_scale
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_residual_adds_first_and_sums_both_gradients(dtype, implementation):
    hidden_TD, residual_TD, weight_D = random_inputs(37, 130, dtype)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(37, 130, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    with launch.forced(implementation):
        outputs = add_rms_norm(hidden_TD, residual_TD, weight_D, epsilon=EPSILON)
        actual = gradients_of(outputs, grads, (hidden_TD, residual_TD, weight_D))

    exact_inputs = [
        tensor.detach().double().requires_grad_() for tensor in (hidden_TD, residual_TD, weight_D)
    ]
    exact_total_TD = exact_inputs[0] + exact_inputs[1]
    exact_outputs = (definition(exact_total_TD, exact_inputs[2]), exact_total_TD)
    exact = gradients_of(exact_outputs, [grad.double() for grad in grads], exact_inputs)

    # bf16: the sum is rounded before the norm, once more than without a residual.
    tolerance = {"rtol": 3e-6, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 2**-5, "atol": 2e-2}
    for actual_tensor, exact_tensor in zip(
        (*outputs, *actual[:2]), (*exact_outputs, *exact[:2]), strict=True
    ):
        torch.testing.assert_close(actual_tensor.double(), exact_tensor, **tolerance)
    assert torch.equal(actual[0], actual[1])
    # 37 terms of the size of one, each with the rounding above.
    torch.testing.assert_close(
        actual[2].double(), exact[2], rtol=tolerance["rtol"], atol=tolerance["atol"] * 37**0.5
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rounds_before_the_weight_as_transformers_does(implementation):
    # fp16, for Triton's interpreter truncates bf16 where a GPU rounds.
    hidden_TD, _, weight_D = random_inputs(64, 512, torch.float16)
    module = GlmRMSNorm(512, EPSILON).to(DEVICE, torch.float16)
    module.weight.data.copy_(weight_D.data)
    with launch.forced(implementation), torch.no_grad():
        normed_TD = rms_norm(hidden_TD, weight_D, epsilon=EPSILON)
        expected_TD = module(hidden_TD)
        rounded_late_TD = definition(hidden_TD.float(), weight_D.float()).half()
    # Sums of another order may flip a rounding now and then; rounding at another place flips every third.
    assert (normed_TD != expected_TD).double().mean() < 1e-3
    assert (rounded_late_TD != expected_TD).double().mean() > 0.1


def test_bf16_reference_equals_transformers():
    hidden_TD, _, weight_D = random_inputs(64, 512, torch.bfloat16)
    module = GlmRMSNorm(512, EPSILON).to(DEVICE, torch.bfloat16)
    module.weight.data.copy_(weight_D.data)
    with launch.forced("reference"), torch.no_grad():
        # Another order of the fp32 sum may flip a rounding in rare elements.
        assert (rms_norm(hidden_TD, weight_D, epsilon=EPSILON) != module(hidden_TD)).double().mean() < 1e-3


def test_gradients_pass_finite_differences():
    inputs = random_inputs(4, 7, torch.float64, device="cpu")
    assert torch.autograd.gradcheck(
        lambda hidden, residual, weight: add_rms_norm(hidden, residual, weight, epsilon=EPSILON), inputs
    )
    assert torch.autograd.gradcheck(
        lambda hidden, weight: rms_norm(hidden, weight, epsilon=EPSILON), (inputs[0], inputs[2])
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_one_output_alone(implementation):
    inputs = random_inputs(5, 33, torch.float32)
    grad_TD = torch.randn(5, 33).to(DEVICE)
    with launch.forced(implementation):
        normed_TD, total_TD = add_rms_norm(*inputs, epsilon=EPSILON)
        of_total = torch.autograd.grad(total_TD, inputs, grad_TD, allow_unused=True, retain_graph=True)
        of_normed = torch.autograd.grad(normed_TD, inputs, grad_TD)
        alone = rms_norm(total_TD.detach().requires_grad_(), inputs[2], epsilon=EPSILON)
        d_weight_D = torch.autograd.grad(alone, inputs[2], grad_TD)[0]
    assert torch.equal(of_total[0], grad_TD)
    assert of_total[2] is None
    assert torch.equal(of_normed[2], d_weight_D)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_inputs_give_the_same_bits(implementation):
    hidden_TD, residual_TD, weight_D = random_inputs(600, 64, torch.float32)
    runs = []
    for _ in range(2):
        with launch.forced(implementation):
            outputs = add_rms_norm(hidden_TD, residual_TD, weight_D, epsilon=EPSILON)
            grads = torch.autograd.grad(outputs, (hidden_TD, weight_D), (hidden_TD, residual_TD))
        runs.append((*outputs, *grads))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows_and_leading_dimensions(implementation):
    weight_D = torch.randn(12).to(DEVICE).requires_grad_()
    with launch.forced(implementation):
        empty_TD = rms_norm(weight_D.new_empty(0, 12).requires_grad_(), weight_D, epsilon=EPSILON)
        (d_weight_D,) = torch.autograd.grad(empty_TD.sum(), weight_D)
        cube = torch.randn(2, 12, 3).to(DEVICE).transpose(1, 2)
        normed = rms_norm(cube, weight_D, epsilon=EPSILON)
        flat = rms_norm(cube.reshape(6, 12), weight_D, epsilon=EPSILON)
    assert empty_TD.shape == (0, 12)
    assert torch.equal(d_weight_D, torch.zeros_like(weight_D))
    assert torch.equal(normed, flat.view(2, 3, 12))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeps_one_number_a_row_beside_its_input(implementation):
    inputs = random_inputs(20, 48, torch.float32)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda t: t
    )
    with launch.forced(implementation), hooks:
        _, total_TD = add_rms_norm(*inputs, epsilon=EPSILON)
    extra = [
        tensor for tensor in saved if tensor.data_ptr() not in (total_TD.data_ptr(), inputs[2].data_ptr())
    ]
    assert [tensor.numel() for tensor in extra] == [20]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight is \(5,\).*one entry per element"):
        rms_norm(torch.zeros(2, 4), torch.zeros(5), epsilon=EPSILON)
    with pytest.raises(ValueError, match="residual is"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 4).bfloat16(), torch.zeros(4), epsilon=EPSILON)
    with launch.forced("triton"), pytest.raises(ValueError, match="float64"):
        rms_norm(*(torch.zeros(*shape, device=DEVICE).double() for shape in ((2, 4), (4,))), epsilon=EPSILON)
