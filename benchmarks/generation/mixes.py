"""The inputs of the benchmark of generation: a model, prompts, lengths."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.harness import peer_model
from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase
from glm_rlhf.engine.rollout.scheduling.request_queue import GenerationRequest
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.topology import Topology

SHAPE = peer_model.SHAPE | {
    "vocab_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "head_dim": 32,
    "eos_token_id": None,
}
MAX_BATCH, PAGE_SIZE = 32, 16
LONGEST_ANSWER = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Prompts, and how long their answers are."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    lengths: tuple[int, ...]
    """Tokens wanted of each answer; where they differ an answer ends near there, at a stop id of its own."""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One prompt's answer."""

    prompt: int
    """Index of the prompt in the mix."""
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    """Of each token under the model; None from a contender that has none."""


def mixes() -> list[Mix]:
    """Return the mixes that are measured."""
    equal = _prompts([24] * 32)
    mixed = _prompts([8 + index * 13 % 33 for index in range(64)])
    tail = [LONGEST_ANSWER if index % 8 == 3 else _geometric(index, 64, mean=16) for index in range(64)]
    return [
        Mix(name="equal, greedy", prompts=equal, lengths=(48,) * 32, temperature=0.0),
        Mix(name="equal, sampled", prompts=equal, lengths=(48,) * 32, temperature=1.0),
        Mix(
            name="uniform, sampled",
            prompts=mixed,
            lengths=tuple(8 + index * 29 % 64 for index in range(64)),
            temperature=1.0,
        ),
        Mix(name="long tail, sampled", prompts=mixed, lengths=tuple(tail), temperature=1.0),
    ]


def random_model() -> torch.nn.Module:
    """Return transformers' model that both sides run."""
    model = peer_model.random_glm(SHAPE)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # wide enough that greedy answers do not repeat one token
            torch.nn.init.normal_(parameter, 0.0, 0.08)
    return model


def requests_of(mix: Mix, chunks: Sequence[GLMModel], topology: Topology) -> list[GenerationRequest]:
    """Return the requests of a mix; where lengths differ, each with the stop id that ends it there."""
    requests = [
        GenerationRequest(
            index=index, prompt=prompt, max_new_tokens=max(mix.lengths), stop_ids=frozenset(), seed=index
        )
        for index, prompt in enumerate(mix.prompts)
    ]
    if min(mix.lengths) == max(mix.lengths):
        return requests
    # A request's answer depends on nothing but itself: this run shows which tokens will come.
    whole = {answer.prompt: answer.tokens for answer in run_of(requests, mix, chunks, topology)()}
    return [
        replace(request, stop_ids=frozenset({_stop_id(whole[request.index], length)}))
        if length < max(mix.lengths)
        else request
        for request, length in zip(requests, mix.lengths, strict=True)
    ]


def run_of(
    requests: Sequence[GenerationRequest], mix: Mix, chunks: Sequence[GLMModel], topology: Topology
) -> Callable[[], list[Answered]]:
    """Return the generation of a mix, in a new phase per run."""
    sampling = SamplingSettings(temperature=mix.temperature)

    def run() -> list[Answered]:
        with phase_of(requests, chunks, topology) as phase:
            return [
                Answered(prompt=done.request, tokens=done.tokens, logprobs=done.untempered_logprobs)
                for done in phase.run(requests, sampling)
            ]

    return run


def phase_of(
    requests: Sequence[GenerationRequest], chunks: Sequence[GLMModel], topology: Topology
) -> GenerationPhase:
    """Return a phase with room for the longest request."""
    batch = GenerationSection(max_batch=MAX_BATCH, max_step_tokens=1024, page_size=PAGE_SIZE)
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    return GenerationPhase(chunks, topology=topology, batch=batch, longest=longest)


def _prompts(lengths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        tuple(torch.randint(3, SHAPE["vocab_size"], (length,), generator=generator).tolist())
        for length in lengths
    )


def _geometric(index: int, count: int, *, mean: float) -> int:
    """Return a quantile of the geometric distribution, another per index: no sample can miss the tail."""
    quantile = (index * 29 % count + 0.5) / count
    return max(1, math.ceil(math.log1p(-quantile) / math.log1p(-1.0 / mean)))


def _stop_id(tokens: Sequence[int], length: int) -> int:
    """Return the id that first comes nearest to the wanted last position."""
    firsts = {token: tokens.index(token) for token in tokens}
    return min(firsts, key=lambda token: abs(firsts[token] + 1 - length))
