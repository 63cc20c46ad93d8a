"""The layout that a policy generates in: training's own, or a second one that holds memory while it lasts."""

import pytest
from tiny_training import Case, make_chunks

from glm_rlhf.engine.rollout.generation_layout import generation_layout, weights_for_generation
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

TIMEOUT_S = 60.0


def held(axes, tp, pp):
    """On each rank: (tp, pp) while generating, whether the chunks are training's, bytes of the second copy
    before, while and after it lasts."""
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(Case(), topology)
        with generation_layout(chunks, topology, tp=tp, pp=pp, timeout_s=TIMEOUT_S) as resharded:
            own = [] if resharded is None else list(resharded._owned.values())
            num_bytes = [sum(tensor.untyped_storage().nbytes() for tensor in own)]
            with weights_for_generation(chunks, topology, resharded) as (weights, used):
                found = (used.layout.tp, used.layout.pp), weights is chunks
                num_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in own))
            num_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in own))
        return *found, num_bytes


@pytest.mark.parametrize(
    "axes, tp, pp",
    [({"tp": 2}, None, None), ({"tp": 2}, 2, None), ({"pp": 2, "vpp": 2}, 1, 2), ({"cp": 2}, 1, 1)],
)
def test_the_same_layout_uses_the_training_weights(ranks, axes, tp, pp):
    layout = axes.get("tp", 1), axes.get("pp", 1)
    assert ranks.run(held, axes, tp, pp) == [(layout, True, [0, 0, 0])] * 4


@pytest.mark.parametrize(
    "axes, tp, pp, expected",
    [({"tp": 2}, 4, None, (4, 1)), ({"tp": 2, "pp": 2}, None, 1, (2, 1)), ({"cp": 2}, 4, None, (4, 1))],
)
def test_a_generation_layout_holds_memory_only_during_generation(ranks, axes, tp, pp, expected):
    for layout, is_own, (before, during, after) in ranks.run(held, axes, tp, pp):
        assert (layout, is_own) == (expected, False)
        assert during > before == after == 0


def refused(axes, tp, pp):
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(Case(), topology)
        with pytest.raises(ValueError) as error:
            with generation_layout(chunks, topology, tp=tp, pp=pp, timeout_s=TIMEOUT_S):
                pass
        return str(error.value)


@pytest.mark.parametrize(
    "tp, pp, sentence", [(4, 2, "does not divide the world"), (None, 3, "not a multiple of pp 3")]
)
def test_an_impossible_layout_is_refused_on_every_rank(ranks, tp, pp, sentence):
    for message in ranks.run(refused, {"tp": 2}, tp, pp):
        assert sentence in message
