"""Random packed batches, as `ppo_advantages` takes them."""

import torch
from kernel_device import DEVICE


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def random_batch(lengths, *, seed=0, dtype=torch.float32, keep=0.7):
    """Return the positional arguments of `ppo_advantages` for random sequences of `lengths`."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_sequences = sum(lengths), len(lengths)
    logprobs, values = (torch.randn(num_tokens, generator=generator).to(dtype) for _ in range(2))
    ref_logprobs = (logprobs.float() + 0.1 * torch.randn(num_tokens, generator=generator)).to(dtype)
    rewards = torch.randn(num_sequences, generator=generator).to(dtype)
    mask = torch.rand(num_tokens, generator=generator) < keep
    tensors = (logprobs, ref_logprobs, values, rewards, packed(lengths), mask)
    return tuple(tensor.to(DEVICE) for tensor in tensors)
