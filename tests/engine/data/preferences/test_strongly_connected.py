"""Components against their definition: two nodes share one exactly when each reaches the other."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_rlhf.engine.data.preferences.strongly_connected import strong_components


@st.composite
def graphs(draw):
    num_nodes = draw(st.integers(1, 9))
    nodes = st.integers(0, num_nodes - 1)
    return [draw(st.lists(nodes, max_size=4)) for _ in range(num_nodes)]


def reaches(followers: list[list[int]]) -> np.ndarray:
    """Return by Warshall's method whether each node reaches each, itself always."""
    reaches_NN = np.eye(len(followers), dtype=bool)
    for node, children in enumerate(followers):
        reaches_NN[node, children] = True
    for middle in range(len(followers)):
        reaches_NN |= np.outer(reaches_NN[:, middle], reaches_NN[middle])
    return reaches_NN


def test_two_cycles_joined_by_one_edge_stay_apart():
    component = strong_components([[1], [2], [0, 3], [4], [3], [0]])
    assert component[0] == component[1] == component[2]
    assert component[3] == component[4]
    assert len(set(component)) == 3


@settings(deadline=None, max_examples=50)
@given(graphs())
def test_components_are_mutual_reachability(followers):
    component = np.array(strong_components(followers))
    reaches_NN = reaches(followers)
    np.testing.assert_array_equal(component[:, None] == component[None, :], reaches_NN & reaches_NN.T)


def test_numbers_run_from_0_without_a_gap():
    assert set(strong_components([[1], [0], [], [3, 3]])) == {0, 1, 2}
    assert strong_components([]) == []


def test_a_chain_and_a_cycle_of_100000_nodes_need_no_recursion():
    num_nodes = 100_000
    chain = [[node + 1] for node in range(num_nodes - 1)] + [[]]
    assert len(set(strong_components(chain))) == num_nodes
    assert len(set(strong_components([*chain[:-1], [0]]))) == 1
