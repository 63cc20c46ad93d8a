"""Weights: random ones are the same in every layout; an initialised head is reported on every rank."""

import pytest
import torch
from tiny_models import make_model, save_folder
from tiny_training import Case, assemble, make_chunks, pieces_of

from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.load import load_model

CASES = (
    Case(),
    Case(role="critic"),
    Case(changes={"has_tied_head": True, "family": "glm4", "has_sandwich_norms": True}),
    Case(changes={"family": "chatglm"}, dtype=torch.bfloat16),
)


def random_pieces(axes):
    with open_topology(Layout(**axes)) as topology:
        answers = []
        for case in CASES:
            chunks = make_chunks(case, topology)
            weights = {name: p.detach() for chunk in chunks for name, p in chunk.named_weights()}
            answers.append(pieces_of(chunks, weights))
        return answers


@pytest.mark.parametrize("axes", [{"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}], ids=str)
def test_random_weights_do_not_depend_on_the_layout(ranks, axes):
    for index, (alone, found) in enumerate(
        zip(random_pieces({}), zip(*ranks.run(random_pieces, axes), strict=True), strict=True)
    ):
        expected, _ = assemble([alone])
        whole, copies = assemble(list(found))
        assert copies == 0
        assert whole.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(whole[name], tensor), (index, name)


def test_random_weights_have_the_spread_that_the_config_says():
    (pieces, critic, *_) = random_pieces({})
    whole, _ = assemble([pieces])
    matrices = {name: tensor for name, tensor in whole.items() if tensor.dim() == 2}
    assert len({float(tensor[0, 0]) for tensor in matrices.values()}) == len(matrices), "each its own numbers"
    for name, tensor in matrices.items():
        # 512 numbers and more: their standard deviation is within 10 %, three of its own deviations.
        assert tensor.std() == pytest.approx(0.15, rel=0.1), name
    assert all((whole[name] == 1).all() for name in whole if "norm" in name)
    assert all((whole[name] == 0).all() for name in whole if name.endswith("bias"))
    head, _ = assemble([critic])
    assert head["score.weight"].std() == pytest.approx(1 / 33, rel=0.4)  # 32 numbers: three deviations
    assert head.keys().isdisjoint({"score.bias"})


def created_and_loaded(axes, folder):
    """What was created on each rank, and whether it is the same head on all that have one."""
    with open_topology(Layout(**axes)) as topology:
        chunks, created = load_model(folder, topology, role="reward", dtype=torch.float32, seed=5)
        again, _ = load_model(folder, topology, role="reward", dtype=torch.bfloat16, seed=5)
        heads = [chunk.value_head.weight.detach() for chunk in (*chunks, *again) if chunk.post_process]
        return created, [head.tolist() for head in heads]


def test_a_head_that_a_folder_lacks_is_named_on_every_rank(ranks, tmp_path):
    folder = save_folder(tmp_path / "model", "glm", make_model("glm"))
    (_, (wanted, _)) = created_and_loaded({}, folder)
    width = read_config(folder).hidden_size
    assert torch.tensor(wanted).shape == (1, width)
    assert 0 < torch.tensor(wanted).abs().max() < 5 / width
    for axes in ({"pp": 4}, {"pp": 2, "vpp": 2}, {"tp": 4}):
        for created, heads in ranks.run(created_and_loaded, axes, folder):
            assert created == ("value_head.weight",)
            assert all(head == wanted for head in heads), "fp32 in a bf16 model too, and the same everywhere"


def test_a_policy_creates_nothing(tmp_path):
    folder = save_folder(tmp_path / "model", "chatglm", make_model("chatglm"))
    with open_topology(Layout()) as topology:
        chunks, created = load_model(folder, topology)
        assert created == ()
        assert {p.dtype for p in chunks[0].parameters()} == {torch.bfloat16}
