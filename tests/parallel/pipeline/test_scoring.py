"""Scores of tokens: packed sequences equal the same sequences alone."""

import pytest
import torch
from tiny_training import CONFIG, Case, make_chunks

from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.pipeline.scoring import score_tokens
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


def sequences():
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, CONFIG.vocab_size, (n,), generator=generator) for n in (7, 1, 30, 2, 1, 64, 13)]


def score_alone_and_packed(axes):
    """Largest differences of logprobs and entropies between one sequence a stream and all in one."""
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(Case(), topology)
        multiple = topology.layout.token_multiple
        alone = score_tokens(chunks, [pack([s], multiple=multiple) for s in sequences()], topology=topology)
        packed = pack(sequences(), multiple=multiple)
        (together,) = score_tokens(chunks, [packed], topology=topology)
        worst = []
        for kind in range(2):
            parts = packed.split(together[kind])
            found = [rows[kind][: len(part)] for rows, part in zip(alone, parts, strict=True)]
            worst.append(max(float((a - b).abs().max()) for a, b in zip(found, parts, strict=True)))
        return worst


@pytest.mark.parametrize("axes", [{}, {"cp": 2, "tp": 2, "sequence_parallel": True}, {"pp": 4}], ids=str)
def test_packed_sequences_equal_the_same_sequences_alone(ranks, axes):
    for worst in ranks.run(score_alone_and_packed, axes):
        # A product of more rows may be cut into other blocks: a rounding or two of fp32. A token that
        # sees its neighbour's sequence is off by 0.1 and more.
        assert max(worst) <= 5e-6, worst


def test_logprobs_and_entropies_belong_to_the_distribution_before_each_token():
    with open_topology(Layout()) as topology:
        chunks = make_chunks(Case(), topology)
        batch = pack(sequences()[:3])
        ((logprobs_T, entropy_T),) = score_tokens(chunks, [batch], topology=topology, temperature=0.5)
        assert logprobs_T[[0, 7, 8]].tolist() == [0, 0, 0], "nothing is said of a first token"
        # Each token in turn replaced by every other one: the probabilities of a position sum to one.
        position, start = 20, 8
        variants = []
        for token in range(CONFIG.vocab_size):
            tokens_T = batch.tokens_T[start:].clone()
            tokens_T[position - start] = token
            variants.append(tokens_T)
        scored = score_tokens(chunks, [pack(variants)], topology=topology, temperature=0.5)
        logprobs_V = torch.stack([part[position - start] for part in pack(variants).split(scored[0][0])])
        entropy = -(logprobs_V.exp() * logprobs_V).sum()
        # Sums of 64 fp32 probabilities.
        assert logprobs_V.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        chosen = logprobs_V[batch.tokens_T[position]].item()
        assert chosen == pytest.approx(logprobs_T[position].item(), abs=1e-5)
        assert entropy.item() == pytest.approx(entropy_T[position].item(), abs=1e-5)


def score_wanted(axes):
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(Case(), topology)
        batch = pack(sequences(), multiple=topology.layout.token_multiple)
        (everything,) = score_tokens(chunks, [batch], topology=topology)
        is_wanted_T = torch.arange(batch.num_tokens) % 3 == 0
        (some,) = score_tokens(chunks, [batch], topology=topology, wanted=[is_wanted_T])
        none = score_tokens(chunks, [batch], topology=topology, wanted=[torch.zeros_like(is_wanted_T)])[0]
        return (
            float((some[0] - everything[0])[is_wanted_T].abs().max()),
            float(some[0][~is_wanted_T].abs().max()),
            float(torch.cat(none).abs().max()),
            score_tokens(chunks, [], topology=topology),
        )


def test_only_wanted_tokens_are_scored(ranks):
    for axes in ({"tp": 2, "cp": 2}, {"pp": 2}):
        for difference, unwanted, none, nothing in ranks.run(score_wanted, axes):
            assert difference <= 1e-6  # the head sees fewer rows at once: a rounding of fp32
            assert (unwanted, none, nothing) == (0, 0, [])
