"""An experience of equally long sequences with random numbers, for steps whose cost is the same for all."""

import torch

from glm_rlhf.engine.types import Experience, PromptInput, Rollouts


def random_experience(
    count: int, *, length: int, prompt_length: int, vocab_size: int, num_global: int
) -> Experience:
    """Return `count` sequences of `length` tokens, of `num_global` over all data-parallel ranks."""
    generator = torch.Generator().manual_seed(5)
    num_tokens = count * length

    def numbers() -> torch.Tensor:
        return torch.randn(num_tokens, generator=generator)

    prompt = PromptInput(tokens=(1,) * prompt_length, extra={})
    rollouts = Rollouts(
        tokens_T=torch.randint(0, vocab_size, (num_tokens,), generator=generator),
        lengths=(length,) * count,
        prompt_lengths=(prompt_length,) * count,
        prompts=(prompt,) * count,
        is_finished=(True,) * count,
        logprobs_T=numbers(),
        temperature=1.0,
        indices=tuple(range(count)),
        num_global=num_global,
    )
    return Experience(
        rollouts=rollouts,
        rewards_B=torch.zeros(count),
        old_logprobs_T=numbers() * 0.1 - 6.2,  # near those of random weights over some hundred ids
        ref_logprobs_T=numbers(),
        values_T=numbers(),
        advantages_T=numbers(),
        returns_T=numbers(),
        kl_T=numbers(),
        metrics={},
    )
