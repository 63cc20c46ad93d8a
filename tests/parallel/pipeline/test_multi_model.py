"""Several models in one schedule: gradients and weights equal separate schedules in every layout."""

from dataclasses import replace

import pytest
import torch
from layout_params import layout_params
from tiny_training import LENGTHS, Case, loss_of, make_batches, make_chunks

from benchmarks.harness.one_rank_world import world_of_one_rank
from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.pipeline.multi_model import scheduled_micro_batches
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches, run_models
from glm_rlhf.parallel.pipeline.timing import PassTimes
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

# Steps of about the gradient's size: roundings of it stay roundings of the weights.
SETTINGS = AdamSettings(lr=0.1, betas=(0.9, 0.95), epsilon=1.0, weight_decay=0.1, clip_grad=0.0)
LAYOUTS = {
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "pp4": {"pp": 4},
    "pp2 cp2": {"pp": 2, "cp": 2},
    "dp4": {},
}
WIDER = {"hidden_size": 48, "num_layers": 8}
POLICY = Case(settings=SETTINGS)
CRITIC = Case(role="critic", settings=SETTINGS, lengths=LENGTHS[1:])  # at dp 2 a rank has one fewer
PAIRS = {
    "equal widths": (POLICY, CRITIC),
    "a wider critic": (POLICY, replace(CRITIC, changes=WIDER)),
    "a tied head": (replace(POLICY, changes={"has_tied_head": True}), CRITIC),
    "no micro-batch on some ranks": (POLICY, replace(CRITIC, lengths=LENGTHS[:1], recomputes=True)),
}
WAYS = (
    ("equal widths", {}),
    ("a wider critic", {"in_backward": True}),
    ("a tied head", {"overlap_communication": True}),
    ("no micro-batch on some ranks", {"in_backward": True}),
)


def train(pair: tuple[Case, ...], topology, *, together: bool, num_steps: int = 2, **way):
    """Losses, gradient norms and this rank's weights of both models after some steps."""
    models = [make_chunks(case, topology) for case in pair]
    states = [training_state(c, SETTINGS, topology=topology, **way) for c in models]
    own = [make_batches(case, topology)[topology.dp_rank :: topology.dp] for case in pair]
    owners = [(case, batch) for case, batches in zip(pair, own, strict=True) for batch in batches]
    numbers = []
    for _ in range(num_steps):
        for state in states:
            state.zero_grad()
        if together:
            losses = run_models(
                [state.chunks for state in states],
                own,
                lambda model, hidden, i: loss_of(owners[i][0], model, hidden, owners[i][1]),
                topology=topology,
                forward_only=False,
            )
            results = [state.step() for state in states]
        else:
            losses, results = [], []
            for case, state, batches in zip(pair, states, own, strict=True):
                losses += run_micro_batches(
                    state.chunks,
                    batches,
                    lambda model, hidden, i, case=case, b=batches: loss_of(case, model, hidden, b[i]),
                    topology=topology,
                    forward_only=False,
                )
                results.append(state.step())
        assert all(result.is_applied for result in results)
        numbers += [*(float(loss) for loss in losses), *(result.grad_norm for result in results)]
    for state in states:
        state.gather_weights()
    return numbers, [p.detach().clone() for chunks in models for chunk in chunks for p in chunk.parameters()]


def distances(axes) -> dict[str, tuple[float, float, float]]:
    """By pair: distance of weights, of reported numbers, and how far the weights moved."""
    found = {}
    with open_topology(Layout(**axes)) as topology:
        for name, way in WAYS:
            pair = PAIRS[name]
            starts = [
                p.detach().clone()
                for case in pair
                for c in make_chunks(case, topology)
                for p in c.parameters()
            ]
            numbers, weights = train(pair, topology, together=True, **way)
            wanted, expected = train(pair, topology, together=False, **way)
            found[name] = (
                max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True)),
                max((abs(a - b) for a, b in zip(numbers, wanted, strict=True)), default=0.0),
                max(float((a - b).abs().max()) for a, b in zip(weights, starts, strict=True)),
            )
    return found


@pytest.mark.parametrize("axes", layout_params(LAYOUTS, quick=("pp2 vpp2", "pp4")))
def test_weights_losses_and_norms_are_those_of_a_schedule_each(ranks, axes):
    for answer in ranks.run(distances, axes):
        assert answer.keys() == PAIRS.keys()
        for case, (of_weights, of_numbers, moved) in answer.items():
            assert of_weights <= 1e-6, (case, of_weights)
            assert of_numbers <= 1e-6, (case, of_numbers)
            assert moved > 1e-3, case


def test_models_of_different_types_are_refused():
    with open_topology(Layout()) as topology:
        models = [make_chunks(case, topology) for case in (POLICY, replace(CRITIC, dtype=torch.bfloat16))]
        with pytest.raises(ValueError, match=r"bfloat16 and torch\.float32 cannot share a pipeline schedule"):
            run_models(
                models, [make_batches(POLICY, topology)] * 2, None, topology=topology, forward_only=True
            )


def scheduled(counts, layout, *, is_final):
    with world_of_one_rank(0, layout.pp), open_topology(layout) as topology:
        shares = [[share(pack([torch.zeros(n + 2).long()])) for n in range(count)] for count in counts]
        padding = share(pack([torch.zeros(1).long()]))
        found = scheduled_micro_batches(shares, padding, topology.layout, is_final=is_final)
    for item in found:
        assert (item.share is padding) == (item.index is None)
    return [(item.model, item.index, item.is_last) for item in found]


def test_models_follow_each_other_with_padding_first():
    assert scheduled((2, 1), Layout(pp=2), is_final=False) == [(0, 0, False), (0, 1, True), (1, 2, True)]
    interleaved = Layout(pp=2, vpp=2)
    assert scheduled((2, 1), interleaved, is_final=False) == [
        (0, None, False),
        (0, 0, False),
        (0, 1, True),
        (1, 2, True),
    ]
    assert scheduled((0, 2), interleaved, is_final=False) == [(1, 0, False), (1, 1, True)]
    # With communication in backward: whole groups per model, and at least one micro-batch of each.
    assert scheduled((0, 3), interleaved, is_final=True) == [
        (0, None, False),
        (0, None, True),
        (1, None, False),
        (1, 0, False),
        (1, 1, False),
        (1, 2, True),
    ]


def test_times_are_shared_as_passes_took_them():
    times = PassTimes(torch.device("cpu"))
    clock = iter((0.0, 3.0, 4.0, 5.0, 7.0, 9.0))
    times._now = lambda: next(clock)
    for role in ("policy", "critic", "policy"):
        with times.passing(role):
            pass
    assert times.shared(12.0) == {"policy": pytest.approx(10.0), "critic": pytest.approx(2.0)}
    assert times.shared(1.0) == {}
