"""Inputs of a policy loss, and its value and gradients by the kernel and by the definition."""

import functools

import torch
import vocabulary_definition as definition
from kernel_device import DEVICE
from vocabulary_definition import gradients, head_inputs

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.lm_head.linear_ppo_loss import linear_ppo_loss
from glm_rlhf.kernels.rl.policy_loss import ppo_policy_loss

PLAIN = {"clip_low": 0.2, "clip_high": 0.2}
EVERYTHING = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "entropy_coef": 0.05,
    "kl_coef": 0.1,
    "kl_estimator": "k3",
}


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
        arguments["ref_logprobs_T"] = logprobs_T + spread * normal_T()
        arguments["importance_weights_T"] = uniform_T() + 0.5
    return hidden_TD, weight_VD, targets_T, arguments


def by_definition(hidden_TD, weight_VD, targets_T, arguments, temperature=0.8):
    """Return (loss, statistics, gradients) of the standalone policy loss on the float64 head."""
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
    """Return (loss, statistics, gradients) of `linear_ppo_loss`."""
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


def counted(function, calls):
    """Return `function` that also appends its arguments to `calls`."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    return run
