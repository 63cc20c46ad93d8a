"""SwiGLU against its float64 definition, GLM's own module and finite differences."""

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.layers.swiglu import swiglu

IMPLEMENTATIONS = ["reference", "triton"]
SHAPES = [(1, 1), (3, 63), (2, 1000), (63, 101), (5, 2051)]


def definition(gate_up_TF2):
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return gate_TF / (1 + torch.exp(-gate_TF)) * up_TF


def random_input(num_rows, ffn_size, dtype, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    gate_up_TF2 = 2 * torch.randn(num_rows, 2 * ffn_size, generator=generator)
    grad_TF = torch.randn(num_rows, ffn_size, generator=generator)
    return gate_up_TF2.to(device, dtype).requires_grad_(), grad_TF.to(device, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_rows, ffn_size", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_equal_the_float64_definition(num_rows, ffn_size, dtype, implementation):
    gate_up_TF2, grad_TF = random_input(num_rows, ffn_size, dtype)
    with launch.forced(implementation):
        out_TF = swiglu(gate_up_TF2)
        (actual,) = torch.autograd.grad(out_TF, gate_up_TF2, grad_TF)
    exact_input = gate_up_TF2.detach().double().requires_grad_()
    exact_TF = definition(exact_input)
    (exact,) = torch.autograd.grad(exact_TF, exact_input, grad_TF.double())
    # fp32: a few roundings. bf16: one, a truncation (2^-7) in Triton's interpreter.
    tolerance = {"rtol": 3e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(out_TF.double(), exact_TF, **tolerance)
    torch.testing.assert_close(actual.double(), exact, **tolerance)


def test_gradient_passes_finite_differences():
    gate_up_TF2, _ = random_input(3, 5, torch.float64, device="cpu")
    assert torch.autograd.gradcheck(swiglu, gate_up_TF2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_gates_neither_overflow_nor_give_nan(implementation):
    gate_up_TF2 = torch.tensor([[1e4, -1e4, 100.0, -100.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], device=DEVICE)
    gate_up_TF2.requires_grad_()
    with launch.forced(implementation):
        out_TF = swiglu(gate_up_TF2)
        (grad,) = torch.autograd.grad(out_TF.sum(), gate_up_TF2)
    # silu(x) is x far right and 0 far left; its slope there is 1 and 0, and 1/2 at 0.
    expected_TF = torch.tensor([[1e4, 0.0, 300.0, 0.0, 0.0]])
    torch.testing.assert_close(out_TF.cpu(), expected_TF, rtol=1e-6, atol=1e-6)
    expected = torch.tensor([[1.0, 0.0, 3.0, 0.0, 2.5, 1e4, 0.0, 100.0, 0.0, 0.0]])
    torch.testing.assert_close(grad.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_inputs_give_the_same_bits(implementation):
    gate_up_TF2, grad_TF = random_input(65, 257, torch.float32)
    with launch.forced(implementation):
        first, second = (torch.autograd.grad(swiglu(gate_up_TF2), gate_up_TF2, grad_TF)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows_leading_dimensions_and_strided_input(implementation):
    with launch.forced(implementation):
        empty = torch.empty(2, 0, 8, device=DEVICE, requires_grad=True)
        assert swiglu(empty).shape == (2, 0, 4)
        assert torch.autograd.grad(swiglu(empty).sum(), empty)[0].shape == empty.shape
        strided = torch.randn(8, 3, 2).to(DEVICE).transpose(0, 2)
        assert torch.equal(swiglu(strided), swiglu(strided.contiguous()))
        assert swiglu(strided).shape == (2, 3, 4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeps_only_its_input(implementation):
    gate_up_TF2, _ = random_input(4, 10, torch.float32)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda t: t
    )
    with launch.forced(implementation), hooks:
        swiglu(gate_up_TF2)
    assert [tensor.data_ptr() for tensor in saved] == [gate_up_TF2.data_ptr()]


def test_odd_width_and_float64_kernel_are_refused():
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.zeros(2, 7))
    with launch.forced("triton"), pytest.raises(ValueError, match="float64"):
        swiglu(torch.zeros(2, 8, device=DEVICE).double())
