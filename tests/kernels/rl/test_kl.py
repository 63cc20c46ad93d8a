"""The KL estimators keep their precision for the small log-ratios of the first PPO steps."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_device import DEVICE

from glm_rlhf.kernels.rl.kl import token_kl, token_kl_slope
from glm_rlhf.kernels.rl.reference_kl import KL_ESTIMATORS
from glm_rlhf.kernels.rl.reference_kl import token_kl as reference_kl


@triton.jit
def _both_kernel(log_ratio_ptr, kl_ptr, slope_ptr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.arange(0, BLOCK)
    log_ratio = tl.load(log_ratio_ptr + token)
    tl.store(kl_ptr + token, token_kl(log_ratio, ESTIMATOR))
    tl.store(slope_ptr + token, token_kl_slope(log_ratio, ESTIMATOR))


def on_device(log_ratio, estimator):
    kl, slope = torch.empty_like(log_ratio), torch.empty_like(log_ratio)
    _both_kernel[(1,)](log_ratio, kl, slope, ESTIMATOR=estimator, BLOCK=log_ratio.numel())
    return kl, slope


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kernel_keeps_relative_accuracy_from_1e_minus_8_to_20(estimator):
    magnitude = torch.logspace(-8, 1.3, 512, dtype=torch.float64)
    log_ratio = torch.cat((-magnitude, magnitude)).float().to(DEVICE)
    kl, slope = on_device(log_ratio, estimator)
    exact = log_ratio.double().requires_grad_()
    exact_kl = reference_kl(exact, estimator)
    (exact_slope,) = torch.autograd.grad(exact_kl.sum(), exact)
    # k3 at |d| = 0.5 loses three bits to cancellation (4e-7); exp(20) in fp32 is good to 20 · 2⁻²⁴.
    torch.testing.assert_close(kl.double(), exact_kl.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=2e-6, atol=0)


def test_reference_in_fp32_keeps_the_digits_of_tiny_log_ratios():
    log_ratio = torch.tensor([1e-7, -1e-6, 1e-5])
    # The series d²/2 - d³/6; the naive fp32 form gives 0 or 6e-8 here.
    expected = log_ratio.double() ** 2 / 2 - log_ratio.double() ** 3 / 6
    torch.testing.assert_close(reference_kl(log_ratio, "k3").double(), expected, rtol=1e-6, atol=0)


def test_hand_worked_values():
    log_ratio = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(reference_kl(log_ratio, "k1"), log_ratio, rtol=0, atol=0)
    torch.testing.assert_close(
        reference_kl(log_ratio, "k2"), torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64), rtol=0, atol=0
    )
    # exp(-2) - 1 + 2 = 1.1353352832, exp(1) - 1 - 1 = 0.7182818285; tolerance: the digits written here.
    torch.testing.assert_close(
        reference_kl(log_ratio, "k3"),
        torch.tensor([0.0, 1.1353352832, 0.7182818285], dtype=torch.float64),
        rtol=0,
        atol=1e-10,
    )


def test_k3_is_never_negative_and_nan_stays_nan():
    log_ratio = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 1e-3
    kl, _ = on_device(log_ratio, "k3")
    assert (kl >= 0).all()
    for estimator in KL_ESTIMATORS:
        kl, slope = on_device(torch.full((16,), torch.nan, device=DEVICE), estimator)
        assert kl.isnan().all()
        assert slope.isnan().all()


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        reference_kl(torch.zeros(1), "k4")
