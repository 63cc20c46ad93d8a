"""Requests to a tiny policy, and the completions of a generation phase."""

import random

import torch

from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase
from glm_rlhf.engine.rollout.scheduling.request_queue import GenerationRequest
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.pipeline.scoring import score_tokens

# A batch smaller than the number of requests, chunked prompts, and too few pages.
TIGHT = {"max_batch": 6, "max_step_tokens": 9, "page_size": 4}
SAMPLED = SamplingSettings()


def make_requests(num_requests=8, *, vocab_size=64, new_tokens=12, longest_prompt=14, seed=5, **changes):
    """Prompts and answers of mixed length; id 2 ends an answer."""
    chooser = random.Random(seed)
    fields = {"num_samples": 1, "stop_ids": frozenset({2})} | changes
    return [
        GenerationRequest(
            index=index,
            prompt=tuple(chooser.randrange(3, vocab_size) for _ in range(chooser.randint(1, longest_prompt))),
            max_new_tokens=chooser.randint(max(1, new_tokens // 3), new_tokens),
            seed=index,
            **fields,
        )
        for index in range(num_requests)
    ]


def make_phase(chunks, topology, requests, *, num_pages=None, record=None, **batch):
    """A phase with pages for two of the longest sequences, or with the given number."""
    settings = TIGHT | batch
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    phase = GenerationPhase(
        chunks, topology=topology, batch=GenerationSection(**settings), longest=longest, record=record
    )
    phase.num_pages = num_pages or 2 * -(-longest // settings["page_size"])
    return phase


def answers(phase, requests, sampling=SAMPLED, **options):
    """Completions by (request, sample)."""
    return {(done.request, done.sample): done for done in phase.run(requests, sampling, **options)}


def full_forward_logprobs(chunks, topology, requests, completions):
    """By (request, sample): logprobs of each answer's tokens under the training forward."""
    prompts = {request.index: request.prompt for request in requests}
    keys = sorted(completions)
    sequences = [torch.tensor(prompts[key[0]] + completions[key].tokens) for key in keys]
    packed = pack(sequences, multiple=topology.layout.token_multiple)
    ((logprobs_T, _),) = score_tokens(chunks, [packed], topology=topology)
    parts = packed.split(logprobs_T)
    return {key: part[len(prompts[key[0]]) :].tolist() for key, part in zip(keys, parts, strict=True)}
