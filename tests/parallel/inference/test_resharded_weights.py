"""Weights in a second layout: bit for bit those that training would load there, through a bounded buffer."""

import pytest
import torch
from peak_memory import peak_bytes
from tiny_generation import answers, make_phase, make_requests
from tiny_training import Case, make_batches, make_chunks, train_step

from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.inference.weight_views import chunk_weights
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.runtime.generation_topology import generation_topology
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

PAIRS = [
    ({"tp": 2}, {"pp": 2}),
    ({"tp": 4}, {}),
    ({"pp": 4}, {"tp": 2}),
    ({"tp": 2, "pp": 2, "sequence_parallel": True}, {"tp": 4}),
    ({"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}),
    ({"cp": 2}, {"pp": 4}),
    ({}, {"tp": 4}),
]
BUFFER_BYTES = 8192
QUICK = {"fp32": (0,), "bf16, tied": (3,)}
"""Of the pairs, those that `make test` runs; `make slow` runs all."""
CASES = {
    "fp32": Case(settings=AdamSettings(lr=1e-2)),
    "bf16, tied": Case(changes={"has_tied_head": True}, dtype=torch.bfloat16, settings=AdamSettings(lr=1e-2)),
}


def bits_of(chunks):
    """Every parameter by its place, as bytes."""
    found = {}
    for number, chunk in enumerate(chunk_weights(chunks)):
        for name, thing in (
            ("embedding", chunk.embedding_VD),
            ("final_norm", chunk.final_norm_D),
            ("head", chunk.head_VD),
        ):
            if thing is not None:
                found[number, name] = thing
        for index, layer in enumerate(chunk.layers):
            for name in layer.__dataclass_fields__:
                found[number, index, name] = getattr(layer, name)
    flat = {}
    for place, thing in found.items():
        parts = thing if isinstance(thing, tuple) else (thing,)
        tensors = [tensor for part in parts for tensor in (part if isinstance(part, tuple) else (part,))]
        for number, tensor in enumerate(tensors):
            if tensor is not None:
                shape, words = tuple(tensor.shape), tensor.detach().contiguous().view(torch.uint8)
                flat[(*place, number)] = (shape, bytes(words.flatten().tolist()))
    return flat


def generated(chunks, topology, num_requests=4):
    requests = make_requests(num_requests)
    with make_phase(chunks, topology, requests) as phase:
        return answers(phase, requests)


def resharded(case, axes, target_axes):
    """On each rank: weights and answers in a second layout, before and after a training step in the first."""
    with open_topology(Layout(**axes)) as first, generation_topology(Layout(**target_axes), first) as second:
        chunks = make_chunks(case, first)
        state = TrainingState(chunks, case.settings, topology=first)
        weights = ReshardedWeights(chunks, second, buffer_bytes=BUFFER_BYTES)
        with weights.filled() as filled:
            before = bits_of(filled), generated(filled, second)
        own_bytes = sum(t.untyped_storage().nbytes() for t in weights._owned.values())
        assert own_bytes == 0, "memory is held while it generates, and no longer"
        batches = make_batches(case, first)[first.dp_rank :: first.dp]
        train_step(case, state, batches, first)
        assert state.step().is_applied
        state.gather_weights()
        with weights.filled() as filled:
            peak = peak_bytes(weights._fill)
            after = generated(filled, second)
            addresses = {tensor.data_ptr() for chunk in chunks for tensor in chunk.parameters()}
            extra = sum(t.nbytes for t in weights._tensors.values() if t.data_ptr() not in addresses)
        own = generated(chunks, first)
    return *before, peak, after, own, extra, weights.num_bytes_sent


def loaded(case, axes):
    """On each rank: weights and answers of a model that was made in a layout."""
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(case, topology)
        return bits_of(chunks), generated(chunks, topology)


@pytest.mark.parametrize(
    "case, source, target",
    [
        pytest.param(case, *pair, marks=[] if n in QUICK[case] else [pytest.mark.slow])
        for case in CASES
        for n, pair in enumerate(PAIRS)
    ],
)
def test_a_second_layout_equals_a_model_made_in_it(ranks, case, source, target):
    case = CASES[case]
    expected = ranks.run(loaded, case, target)
    for (bits, found, peak, after, own, _, _), (expected_bits, expected_answers) in zip(
        ranks.run(resharded, case, source, target), expected, strict=True
    ):
        assert bits == expected_bits
        # The same forward on the same numbers: tokens and logprobs agree to the last bit.
        assert found == expected_answers
        assert after != found, "the weights have changed"
        if case.dtype == torch.float32:
            # Copies of the model share the requests differently, and sums are split differently over tp.
            common = after.keys() & own.keys()
            assert common
            for key in common:
                assert after[key].tokens == own[key].tokens
                assert after[key].untempered_logprobs == pytest.approx(own[key].untempered_logprobs, abs=1e-5)
        # The buffer, and lists of its parts that the collective makes.
        assert peak <= BUFFER_BYTES * 1.25


def alone(axes, target_axes):
    """On each rank: the answer to one request in both layouts. A step holds the same rows in both."""
    with open_topology(Layout(**axes)) as first, generation_topology(Layout(**target_axes), first) as second:
        chunks = make_chunks(Case(), first)
        with ReshardedWeights(chunks, second).filled() as filled:
            return generated(chunks, first, 1), generated(filled, second, 1)


@pytest.mark.parametrize(
    "source, target", [({"pp": 4}, {"pp": 2}), ({"pp": 2}, {}), ({"tp": 2}, {"tp": 2, "pp": 2})]
)
def test_other_stages_give_the_same_bits(ranks, source, target):
    for first, second in ranks.run(alone, source, target):
        assert len(first) == 1
        assert first == second


def test_equal_layouts_share_memory_and_send_nothing(ranks):
    for *_, extra, num_sent in ranks.run(resharded, CASES["fp32"], {"tp": 2, "pp": 2}, {"tp": 2, "pp": 2}):
        assert (extra, num_sent) == (0, 0)


def test_what_is_sent_is_what_a_rank_lacks(ranks):
    sent = [num_sent for *_, num_sent in ranks.run(resharded, CASES["fp32"], {"tp": 2}, {"tp": 4})]
    embedding_and_head = 2 * 64 * 32
    query_with_bias, output, mlp = 64 * 33, 64 * 32, 3 * 48 * 32
    quarter = (embedding_and_head + 4 * (query_with_bias + output + mlp)) // 4
    key_value = 4 * 2 * 8 * 33  # one key head and one value head a layer, with biases
    # Two halves twice become four quarters: ranks 0 and 3 have theirs. Rank 1 has the second half and wants
    # the second quarter, rank 2 the first half and the third quarter: they serve each other. No norm moves.
    assert sent == [0, 4 * (quarter + key_value), 4 * (quarter + key_value), 0]
