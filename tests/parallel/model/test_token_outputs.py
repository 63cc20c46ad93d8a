"""Heads: the scalar head and a tied vocabulary head equal one rank's in every layout."""

import pytest
import torch
from layout_params import layout_params
from tiny_training import CONFIG, READS_GRADIENT, Case, assert_equal, make_chunks, run_cases

from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.model.token_outputs import next_tokens, shift_to_rows, shift_to_tokens, token_values
from glm_rlhf.parallel.optim.training_state import TrainingState
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

CASES = [
    Case(role="critic"),
    Case(role="reward", changes={"family": "glm4", "has_sandwich_norms": True}),
    Case(changes={"has_tied_head": True}),
]
LAYOUTS = {
    "dp4": {},
    "tp4 sp": {"tp": 4, "sequence_parallel": True},
    "pp4": {"pp": 4},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp2 cp2 sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "pp2 cp2": {"pp": 2, "cp": 2},
}


@pytest.fixture(scope="module")
def expected():
    return run_cases({}, CASES)


@pytest.mark.parametrize("axes", layout_params(LAYOUTS, quick=("pp2 vpp2", "tp2 cp2 sp")))
def test_scalar_and_tied_heads_equal_one_rank(ranks, expected, axes):
    found = ranks.run(run_cases, axes, CASES)
    for index, answers in enumerate(expected):
        assert_equal([rank[index] for rank in found], answers)


def test_one_rank_has_something_to_be_equal_to(expected):
    for answers in expected:
        assert len(answers["outputs"]) == 9
        assert all(output.isfinite().all() for output in answers["outputs"])
        assert answers["norms"][0] > 0.01
        for name, _, _, step in answers["pieces"]:
            assert step.abs().max() > 0, f"{name} has no gradient"


def test_the_scalar_head_of_a_bf16_model_computes_and_learns_in_fp32():
    with open_topology(Layout()) as topology:
        chunks = make_chunks(Case(role="critic", dtype=torch.bfloat16), topology)
        state = TrainingState(chunks, READS_GRADIENT, topology=topology)
        kinds = {name: p.dtype for name, p in chunks[0].named_weights()}
        assert kinds.pop("value_head.weight") == torch.float32
        assert set(kinds.values()) == {torch.bfloat16}
        assert {buffer.param_dtype for buffer in state.chunks[0].buffers} == {torch.float32, torch.bfloat16}
        hidden_TD = chunks[0](share(pack([torch.tensor([3, 1, 4])])))
        assert hidden_TD.dtype == torch.bfloat16
        values_T = token_values(chunks[0], hidden_TD)
        head = chunks[0].value_head
        wanted_T = (hidden_TD.double() * head.weight.double()).sum(1)
        assert values_T.dtype == torch.float32
        # fp32 sums of 32 products; a head in bf16 would be off by 1e-3.
        assert (values_T - wanted_T).abs().max() <= 1e-6


def test_values_of_a_policy_are_refused():
    with open_topology(Layout()) as topology:
        (model,) = make_chunks(Case(), topology)
        with pytest.raises(ValueError, match=r"a policy has a vocabulary head, .* critic or a reward"):
            token_values(model, torch.zeros(2, CONFIG.hidden_size))


def test_rows_predict_the_next_token_of_their_own_sequence():
    packed = pack([torch.tensor([5]), torch.tensor([6, 7, 8]), torch.tensor([9, 1])], multiple=4)
    assert packed.num_padding == 2
    skip = -100
    assert next_tokens(packed).tolist() == [skip, 7, 8, skip, 1, skip, skip, skip]
    wanted_T = torch.tensor([True, True, False, True, False, True, True, True])
    assert next_tokens(packed, wanted_T).tolist() == [skip, skip, 8, skip, 1, skip, skip, skip]
    assert wanted_T.sum() == 6, "the caller's mask is left as it was"


def test_shifts_are_inverse_but_for_the_ends():
    values_T = torch.tensor([1.0, 2.0, 3.0])
    assert shift_to_rows(values_T, last=-1).tolist() == [2, 3, -1]
    assert shift_to_tokens(values_T).tolist() == [0, 1, 2]
    assert shift_to_tokens(shift_to_rows(values_T)).tolist() == [0, 2, 3]
    assert shift_to_rows(torch.tensor([4.0])).tolist() == [0]
