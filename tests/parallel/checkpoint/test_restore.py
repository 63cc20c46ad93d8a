"""Checkpoints across layouts: weights bit for bit, and training continues as without an interruption."""

from dataclasses import replace

import pytest
import torch
from tiny_training import Case, assemble, make_batches, make_chunks, pieces_of, train_step

from glm_rlhf.parallel.checkpoint.restore import checkpoint_at, newest_checkpoint, restore
from glm_rlhf.parallel.checkpoint.save import CheckpointWriter
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.storage.checkpoint_manifest import ADAM_MOMENTS, WEIGHT
from glm_rlhf.parallel.storage.checkpoint_tensors import open_checkpoint

ADAM = AdamSettings(lr=1e-2, weight_decay=0.01)
# In backward a layout also decides by which norms a layer is clipped; the same layout does so again.
UNCLIPPED, CLIPPED = replace(ADAM, clip_grad=0.0), replace(ADAM, clip_grad=0.1)
CASES = {
    "policy": Case(settings=ADAM),
    "critic": Case(role="critic", settings=ADAM),
    "tied": Case(changes={"has_tied_head": True}, settings=ADAM),
    "bf16": Case(dtype=torch.bfloat16, settings=ADAM),
    # The body is bf16 and the value head fp32: the optimizer lists the head first.
    "bf16 critic": Case(role="critic", dtype=torch.bfloat16, settings=ADAM),
    "frozen": Case(frozen=("embedding", "decoder.layers.0"), settings=ADAM),
    "unclipped": Case(settings=UNCLIPPED),
    "backward": Case(settings=UNCLIPPED, in_backward=True),
    "backward bf16": Case(dtype=torch.bfloat16, settings=UNCLIPPED, in_backward=True),
    "backward tied": Case(
        changes={"has_tied_head": True, "ffn_size": 44, "vocab_size": 68},  # sizes that no group divides
        settings=UNCLIPPED,
        in_backward=True,
    ),
    "backward frozen": Case(
        role="critic", frozen=("embedding", "decoder.layers.0"), settings=UNCLIPPED, in_backward=True
    ),
    "backward bf16 critic": Case(role="critic", dtype=torch.bfloat16, settings=UNCLIPPED, in_backward=True),
    "clipped": Case(settings=CLIPPED, in_backward=True),
    "clipped tied": Case(
        dtype=torch.bfloat16, changes={"has_tied_head": True}, settings=CLIPPED, in_backward=True
    ),
    "clipped bf16": Case(dtype=torch.bfloat16, settings=CLIPPED, in_backward=True),
}
TP4 = {"tp": 4, "sequence_parallel": True}  # more ranks than key/value heads: these are copied
PAIRS = [
    ("policy", {}, {"tp": 2, "pp": 2}),
    ("policy", {"tp": 2, "pp": 2}, {}),
    ("policy", {"tp": 2}, {"pp": 2}),
    ("policy", {"pp": 2}, {"tp": 2}),
    ("policy", TP4, {"tp": 2}),
    ("policy", {"tp": 2}, TP4),
    ("policy", {"pp": 4}, TP4),
    ("policy", {"pp": 2, "vpp": 2}, {"pp": 4}),
    ("policy", {"cp": 2}, {"pp": 2, "vpp": 2}),
    ("critic", TP4, {"pp": 2}),
    ("critic", {"tp": 2, "pp": 2}, {"tp": 2}),
    ("tied", {"pp": 2}, {"tp": 2}),
    ("tied", {"tp": 2}, {"pp": 4}),
    ("bf16", {"tp": 2}, {"pp": 2}),
    ("bf16", {}, TP4),
    ("frozen", {"pp": 2}, {"tp": 2, "pp": 2}),
    ("backward bf16", {"tp": 2}, {"pp": 2}),
    ("backward tied", {"tp": 2, "pp": 2}, {}),
    ("backward", {"pp": 2}, TP4),
    ("backward", TP4, {"pp": 2, "vpp": 2}),
    ("backward", {"cp": 2}, {"tp": 2, "pp": 2}),
    ("backward bf16", {}, TP4),
    ("backward tied", {}, {"pp": 4}),
    ("backward frozen", {"pp": 2}, {"tp": 2}),
    ("bf16 critic", {"pp": 2}, {"tp": 2}),
    ("backward bf16 critic", {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}),
]
SAME = [
    ("policy", {"tp": 2}),
    ("clipped tied", {"pp": 2}),
    ("bf16 critic", {"pp": 2, "vpp": 2}),
    ("bf16", {"pp": 2, "vpp": 2}),
    ("critic", {"cp": 2}),
    ("tied", {"pp": 2}),
    ("clipped", TP4),
    ("clipped", {"pp": 2, "vpp": 2}),
    ("clipped tied", {"tp": 2, "pp": 2}),
    ("clipped tied", {"pp": 4}),
    ("clipped bf16", {"tp": 2}),
]


def make_state(case, topology, seed=7):
    chunks = make_chunks(case, topology, seed=seed)
    return training_state(chunks, case.settings, topology=topology, in_backward=case.in_backward)


def take_steps(case, state, topology, count):
    """Losses of some steps, all on the same data."""
    mine = make_batches(case, topology)[topology.dp_rank :: topology.dp]
    losses = []
    for _ in range(count):
        losses.append(train_step(case, state, mine, topology))
        assert state.step().is_applied
    return losses


def weights_here(state):
    return pieces_of(
        state.bare_chunks, {n: p.detach().clone() for c in state.bare_chunks for n, p in c.named_weights()}
    )


def saved_and_loaded(folder, case, source, target, later=None):
    """On each rank: weights and further losses of a run, and of one that resumes from its checkpoint.

    The second is of the case `later`, the same if there is none.
    """
    with open_topology(Layout(**source)) as topology:
        state = make_state(case, topology)
        take_steps(case, state, topology, 2)
        with CheckpointWriter(folder, topology=topology, keep_last=2) as writer:
            writer.save(2, {"policy": state}, state={})
        before = weights_here(state)
        losses = take_steps(case, state, topology, 2)
        after = weights_here(state)
    with open_topology(Layout(**target)) as topology:
        state = make_state(later or case, topology, seed=8)
        restore(state, newest_checkpoint(folder, topology=topology), "policy")
        loaded = weights_here(state)
        with CheckpointWriter(folder, topology=topology, keep_last=2, is_async=False) as writer:
            writer.save(3, {"policy": state}, state={})
        return before, loaded, losses, take_steps(case, state, topology, 2), after, weights_here(state)


def whole_tensors(folder, kind):
    """All tensors of a kind in a checkpoint, fp32, as bytes."""
    found = {}
    for name, tensor in open_checkpoint(folder).tensors("policy", kind).items():
        out = torch.empty(tensor.shape, dtype=torch.float32)
        tensor.read_into(0, 0, tensor.shape[0], out)
        found[name] = bytes(out.view(-1).view(torch.uint8).numpy())
    return found


def assert_same_content(folder, case):
    """Check that what was saved right after loading is what was loaded."""
    kinds = (WEIGHT,) if case.frozen else (WEIGHT, *ADAM_MOMENTS)  # frozen weights have no moments
    for kind in kinds:
        assert whole_tensors(folder / "step_3", kind) == whole_tensors(folder / "step_2", kind), kind


QUICK = (3, 5, 17, 24)
"""Of the pairs, those that run with every change; `make slow` and the table of promises run all."""


@pytest.mark.parametrize(
    "name, source, target",
    [pair if i in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for i, pair in enumerate(PAIRS)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_another_layout_has_the_same_bits_and_resumes(ranks, tmp_path, name, source, target):
    case = CASES[name]
    answers = ranks.run(saved_and_loaded, tmp_path, case, source, target)
    (before, _), (loaded, copies) = (assemble([answer[i] for answer in answers]) for i in (0, 1))
    assert copies == 0
    assert before.keys() == loaded.keys()
    for weight, expected in before.items():
        assert torch.equal(loaded[weight], expected), weight
    assert_same_content(tmp_path, case)
    # bf16 keeps 8 bits, and sums over ranks round differently; fp32 differs in the order of sums.
    tolerance = 2e-2 if case.dtype is torch.bfloat16 else 1e-6
    for *_, losses, others, _, _ in answers:
        assert others == pytest.approx(losses, rel=tolerance)
        assert others[1] < others[0]


@pytest.mark.parametrize(
    "name, axes", [*SAME[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in SAME[2:])], ids=str
)
def test_the_same_layout_resumes_bit_for_bit(ranks, tmp_path, name, axes):
    for _, _, losses, others, after, later in ranks.run(saved_and_loaded, tmp_path, CASES[name], axes, axes):
        assert others == losses
        for expected, found in zip(after, later, strict=True):
            assert found[:3] == expected[:3]
            assert torch.equal(found[3], expected[3]), found[0]


OPTIMIZERS = [
    ("unclipped", {"tp": 2, "pp": 2}, "backward", {"tp": 2, "pp": 2}),
    ("backward", {"tp": 2}, "unclipped", {"pp": 2}),
    ("unclipped", {}, "backward", TP4),
    ("backward", {"pp": 2, "vpp": 2}, "unclipped", {"cp": 2}),
]


@pytest.mark.parametrize(
    "name, source, later, target",
    [OPTIMIZERS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in OPTIMIZERS[1:])],
    ids=str,
)
def test_either_optimizer_resumes_from_the_others_checkpoint(ranks, tmp_path, name, source, later, target):
    answers = ranks.run(saved_and_loaded, tmp_path, CASES[name], source, target, CASES[later])
    (before, _), (loaded, _) = (assemble([answer[i] for answer in answers]) for i in (0, 1))
    for weight, expected in before.items():
        assert torch.equal(loaded[weight], expected), weight
    assert_same_content(tmp_path, CASES[name])
    for *_, losses, others, _, _ in answers:
        assert others == pytest.approx(losses, rel=1e-6)  # fp32, in another order


def resume_after_a_partial_step(folder):
    """Changes of two steps more, and what they clip by: of a run, and of one from its checkpoint."""
    case = CASES["clipped bf16"]
    with open_topology(Layout()) as topology:
        state, found = make_state(case, topology), []
        weight = dict(state.bare_chunks[0].named_weights())[
            "decoder.layers.1.self_attention.linear_proj.weight"
        ]
        handle = weight.register_hook(lambda gradient: gradient * torch.nan)
        train_step(case, state, make_batches(case, topology), topology)
        assert not state.step().is_applied
        handle.remove()
        with CheckpointWriter(folder, topology=topology, keep_last=1, is_async=False) as writer:
            writer.save(0, {"policy": state}, state={})
        again = make_state(case, topology, seed=8)
        restore(again, checkpoint_at(folder / "step_0", topology=topology), "policy")
        for each in (state, again):
            take_steps(case, each, topology, 2)
            found.append((weights_here(each), each.gradient_squares))
        return found


def test_moments_of_a_partial_first_step_are_kept(tmp_path):
    (expected, squares), (found, others) = resume_after_a_partial_step(tmp_path)
    assert others == squares
    assert sum(squares.values()) > CLIPPED.clip_grad**2
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one[3], other[3]), one[0]


def load_alone(folder, case):
    with open_topology(Layout()) as topology:
        state = make_state(case, topology, seed=8)
        restore(state, checkpoint_at(folder, topology=topology), "policy")
        return weights_here(state), take_steps(case, state, topology, 1)


def load_here(folder, case, axes):
    with open_topology(Layout(**axes)) as topology:
        state = make_state(case, topology, seed=8)
        restore(state, checkpoint_at(folder, topology=topology), "policy")
        return weights_here(state), take_steps(case, state, topology, 1)


@pytest.mark.parametrize("axes", [{"tp": 2, "pp": 2}, pytest.param(TP4, marks=pytest.mark.slow)], ids=str)
def test_one_rank_and_four_load_each_others(ranks, tmp_path, axes):
    case = CASES["policy"]
    answers = ranks.run(saved_and_loaded, tmp_path / "four", case, axes, axes)
    (expected, _) = assemble([answer[0] for answer in answers])
    pieces, losses = load_alone(tmp_path / "four" / "step_2", case)
    found, _ = assemble([pieces])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses == pytest.approx(answers[0][2][:1], rel=1e-6)
    before, _, losses, *_ = saved_and_loaded(tmp_path / "one", case, {}, {})
    expected, _ = assemble([before])
    answers = ranks.run(load_here, tmp_path / "one" / "step_2", case, axes)
    found, _ = assemble([pieces for pieces, _ in answers])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for _, others in answers:
        assert others == pytest.approx(losses[:1], rel=1e-6)


def load_another(folder, case):
    with open_topology(Layout()) as topology:
        state = make_state(case, topology)
        restore(state, checkpoint_at(folder, topology=topology), "policy")


def test_another_model_is_refused(tmp_path):
    saved_and_loaded(tmp_path, CASES["policy"], {}, {})
    with pytest.raises(ValueError, match="resume with the model of the checkpoint"):
        load_another(tmp_path / "step_2", replace(CASES["policy"], changes={"rope_theta": 2e4}))
    with pytest.raises(ValueError, match="resume with the model"):
        load_another(tmp_path / "step_2", CASES["critic"])
