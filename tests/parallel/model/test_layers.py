"""Layers: recomputed in backward they give the same gradients, and without gradients they keep nothing."""

from dataclasses import replace

import pytest
import torch
from tiny_training import Case, assert_equal, make_batches, make_chunks, run_cases

from glm_rlhf.parallel.model.packing import share
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

SANDWICH = {"family": "glm4", "has_sandwich_norms": True}
CASES = [Case(changes=SANDWICH), Case(role="critic")]


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"tp": 4, "sequence_parallel": True}, marks=pytest.mark.slow),
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2, "vpp": 2},
    ],
    ids=str,
)
def test_layers_that_run_again_in_backward_give_the_same_gradients(ranks, axes):
    expected = run_cases({}, CASES)
    again = [replace(case, recomputes=True, overlaps=index == 0) for index, case in enumerate(CASES)]
    for index, found in enumerate(zip(*ranks.run(run_cases, axes, again), strict=True)):
        assert_equal(list(found), expected[index])


def kept_for_backward(*, recomputes: bool, with_grad: bool) -> int:
    """Elements that a forward pass of one rank saves for backward."""
    with open_topology(Layout()) as topology:
        case = Case(changes=SANDWICH, recomputes=recomputes)
        (chunk,) = make_chunks(case, topology)
        batch = make_batches(case, topology)[0]
        kept = []

        def save(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.set_grad_enabled(with_grad), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            hidden_TD = chunk(share(batch))
        assert hidden_TD.requires_grad == with_grad
        return sum(kept)


def test_a_pass_without_gradients_keeps_nothing():
    assert kept_for_backward(recomputes=False, with_grad=False) == 0
    assert kept_for_backward(recomputes=True, with_grad=False) == 0


def test_recomputed_layers_keep_little_more_than_their_input():
    whole = kept_for_backward(recomputes=False, with_grad=True)
    # A layer keeps [T, D] of its own and some five norms, projections and gates of that size or above.
    assert 0 < kept_for_backward(recomputes=True, with_grad=True) < whole / 5
