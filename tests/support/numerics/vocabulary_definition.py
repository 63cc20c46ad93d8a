"""The float64 definition of logprob and entropy with torch's softmax, and distances from it."""

import torch
from kernel_device import DEVICE

IGNORE_INDEX = -100


def logprob_and_entropy(logits_TV, targets_T, temperature=1.0):
    """Return (logprobs_T, entropy_T) in float64; differentiable; ignored rows are 0."""
    is_kept_T = targets_T != IGNORE_INDEX
    logp_TV = torch.log_softmax(logits_TV.double() / temperature, dim=-1)
    logprobs_T = logp_TV.gather(1, targets_T.clamp(min=0).long()[:, None]).squeeze(1)
    possible_TV = torch.where(logp_TV == -torch.inf, 0, logp_TV)
    entropy_T = -(logp_TV.exp() * possible_TV).sum(-1)
    return torch.where(is_kept_T, logprobs_T, 0), torch.where(is_kept_T, entropy_T, 0)


def head(hidden_TD, weight_VD, targets_T, temperature=1.0):
    """Return (logprobs_T, entropy_T) of the logits hidden @ weight.T."""
    return logprob_and_entropy(hidden_TD.double() @ weight_VD.double().t(), targets_T, temperature)


def head_inputs(num_rows, vocab_size, width, dtype, *, seed=0, num_ignored=None, device=DEVICE):
    """Return (hidden_TD, weight_VD, targets_T, dlogprobs_T, dentropy_T); logits have a spread of about 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = 3 * torch.randn(num_rows, width, generator=generator)
    weight_VD = torch.randn(vocab_size, width, generator=generator) / width**0.5
    targets_T = random_targets(num_rows, vocab_size, generator, num_ignored)
    upstream = torch.randn(2, num_rows, generator=generator).to(device)
    return hidden_TD.to(device, dtype), weight_VD.to(device, dtype), targets_T.to(device), *upstream


def random_targets(num_rows, vocab_size, generator, num_ignored=None):
    """Return targets of which `num_ignored`, by default a quarter, are `IGNORE_INDEX`."""
    targets_T = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    num_ignored = num_rows // 4 if num_ignored is None else num_ignored
    targets_T[torch.randperm(num_rows, generator=generator)[:num_ignored]] = IGNORE_INDEX
    return targets_T


def gradients(function, inputs, upstream):
    """Return (outputs, gradients of the inputs) of `function(*inputs)` under the given upstream gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    pairs = [(o, g.to(o)) for o, g in zip(outputs, upstream, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return [output.detach() for output in outputs], [leaf.grad for leaf in leaves]


def relative(actual, expected):
    """Return the Frobenius norm of the difference over that of the expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()
