"""Tokens that a generation phase samples have the stated distribution."""

from collections import Counter

import pytest
import torch
from tiny_generation import full_forward_logprobs
from tiny_training import Case, make_chunks

from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase
from glm_rlhf.engine.rollout.scheduling.requests import Completion, GenerationRequest
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


@pytest.fixture
def topology():
    with open_topology(Layout()) as topology:
        yield topology


NUM_DRAWS = 3000


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(),
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                SamplingSettings(temperature=0.6),
                SamplingSettings(temperature=1.5, top_k=9),
                SamplingSettings(top_p=0.7),
            )
        ),
        SamplingSettings(temperature=1.2, top_k=12, top_p=0.9, masked_ids_V=torch.arange(64) % 3 == 0),
    ],
)
def test_second_tokens_have_the_stated_frequencies(topology, sampling):
    chunks = make_chunks(Case(), topology)
    prompt = (5, 9, 33)
    found = draw_many(chunks, topology, prompt, sampling)
    check_frequencies(Counter(tokens[0] for tokens in found), next_probs(chunks, topology, prompt, sampling))
    # Tokens sampled after the most frequent first token: its key and value count too.
    first, count = Counter(tokens[0] for tokens in found).most_common(1)[0]
    seconds = Counter(tokens[1] for tokens in found if tokens[0] == first)
    assert seconds.total() == count
    check_frequencies(seconds, next_probs(chunks, topology, (*prompt, first), sampling))


def draw_many(chunks, topology, prompt, sampling):
    request = GenerationRequest(
        index=0, prompt=prompt, num_samples=NUM_DRAWS, max_new_tokens=2, stop_ids=frozenset(), seed=11
    )
    batch = GenerationSection(max_batch=1000, max_step_tokens=1000, page_size=4)
    with GenerationPhase(chunks, topology=topology, batch=batch, longest=8) as phase:
        return [done.tokens for done in phase.run([request], sampling)]


def next_probs(chunks, topology, context, sampling):
    """The stated distribution of the next token, float64 [V], from training forwards."""
    vocab_size = chunks[0].glm.vocab_size
    requests = [
        GenerationRequest(index=i, prompt=context, max_new_tokens=1, stop_ids=frozenset(), seed=0)
        for i in range(vocab_size)
    ]
    every_token = {(i, 0): replace_tokens((i,)) for i in range(vocab_size)}
    logprobs = full_forward_logprobs(chunks, topology, requests, every_token)
    logits = torch.tensor([logprobs[i, 0][0] for i in range(vocab_size)], dtype=torch.float64)
    if sampling.masked_ids_V is not None:
        logits = logits.masked_fill(sampling.masked_ids_V, -torch.inf)
    logits = logits / sampling.temperature
    order = logits.argsort(descending=True)
    if sampling.top_k:
        logits[order[sampling.top_k :]] = -torch.inf
    probs = logits.softmax(0)
    above = probs[order].cumsum(0) - probs[order]
    probs[order[above >= sampling.top_p]] = 0.0
    return probs / probs.sum()


def replace_tokens(tokens):
    return Completion(
        request=0, sample=0, tokens=tokens, logprobs=(), untempered_logprobs=(), finish_reason="length"
    )


def check_frequencies(counts, probs):
    """Pearson's chi-square over ids expected at least five times; the others share one class."""
    assert all(probs[token] > 0 for token in counts), "an id that is masked or cut was drawn"
    expected = probs * counts.total()
    is_frequent = expected >= 5
    observed = torch.tensor([float(counts[token]) for token in range(len(probs))])
    classes = [(observed[is_frequent], expected[is_frequent])]
    if expected[~is_frequent].sum() >= 5:
        classes.append((observed[~is_frequent].sum()[None], expected[~is_frequent].sum()[None]))
    observed, expected = (torch.cat(parts).double() for parts in zip(*classes, strict=True))
    statistic = ((observed - expected).square() / expected).sum().item()
    freedom = len(expected) - 1
    # Mean n, standard deviation √2n; the seeds are fixed, so that this passes always or never. Five standard
    # deviations leave one in a million; a temperature that is off by 10 % gives more than twenty.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5
