"""Prompts and answers that all have their full length, so that an iteration's work does not vary."""

import torch

from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.cost.workload import Workload
from glm_rlhf.engine.rollout.generate import AnswerSettings
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.spec.model_config import GLMConfig


def full_length_work(
    *,
    prompt_tokens: int,
    new_tokens: int,
    num_prompts: int,
    max_step_tokens: int,
    itemsize: int,
    page_size: int = 16,
) -> Workload:
    """Return an iteration of one epoch and one mini-batch with prompts and answers of full length."""
    return Workload(
        max_prompt_tokens=prompt_tokens,
        max_new_tokens=new_tokens,
        mean_prompt_tokens=prompt_tokens,
        mean_new_tokens=new_tokens,
        num_prompts=num_prompts,
        num_samples=1,
        max_batch=num_prompts,
        max_step_tokens=max_step_tokens,
        page_size=page_size,
        itemsize=itemsize,
        epochs=1,
        minibatches=1,
        recomputes_logprobs=False,
    )


def full_length_answers(
    *,
    new_tokens: int,
    max_batch: int,
    max_step_tokens: int,
    page_size: int = 16,
    temperature: float = 1.0,
    num_samples: int = 1,
) -> AnswerSettings:
    """Return settings of generation under which no stop id ends an answer."""
    return AnswerSettings(
        sampling=SamplingSettings(temperature=temperature),
        generation=GenerationSection(
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            page_size=page_size,
            max_new_tokens=new_tokens,
            num_samples=num_samples,
        ),
        stop_ids=frozenset(),
    )


def random_prompts(model: GLMConfig, work: Workload) -> list[PromptInput]:
    """Return an iteration's prompts, all of the longest."""
    size = (work.num_prompts, work.max_prompt_tokens)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.vocab_size, size, generator=generator).tolist()
    return [PromptInput(tokens=tuple(prompt), extra={}) for prompt in ids]
