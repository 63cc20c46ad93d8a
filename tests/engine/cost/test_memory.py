"""The plan's memory against what the engine's own steps hold, storage by storage, in every kind of layout."""

from dataclasses import replace

import pytest

from benchmarks.planning.memory import CASES, WORLD_SIZE, count, predict, predicted_phases
from glm_rlhf.engine.cost.memory import TRAINED, rank_memory
from glm_rlhf.engine.cost.workload import Roles


def test_offloaded_states_take_no_memory_in_the_phases_that_do_not_need_them():
    case = CASES[0]
    roles = Roles(**dict.fromkeys(("policy", "critic", "reference", "reward"), case.model))
    works = (case.work, replace(case.work, offloads=frozenset({"optimizers", "reference"})))
    plain, offloaded = (rank_memory(roles, w, case.choice, num_gpus=WORLD_SIZE, stage=0) for w in works)
    trained = [plain.roles[name] for name in TRAINED]
    optimizers = sum(role.optimizer + role.gradients for role in trained)
    less = {name: plain.phases[name] - offloaded.phases[name] for name in plain.phases}
    reference = plain.roles["reference"].weights
    assert less == {
        **dict.fromkeys(("generate", "score"), optimizers),
        **dict.fromkeys(("train policy", "train critic", "step"), reference),
        "start": 0,
    }
    assert offloaded.resident == plain.resident


QUICK = 5
"""Of the cases, the one that `make test` counts; `make slow` counts all."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if number == QUICK else pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_the_counted(case):
    """On the first stage, and on the last of a long pipeline, which holds least."""
    last = case.choice.layout.pp - 1
    for stage in {0, last if last > 1 else 0}:
        counted = count(case, rank=0 if stage == 0 else WORLD_SIZE - 1)
        memory = predict(case, stage=stage)
        for role, held in memory.roles.items():
            if role in counted.gradients:
                # Fillings of buffers: at most their alignment a parameter, of thousands.
                assert held.weights == pytest.approx(counted.weights[role], rel=2e-3), role
                assert held.gradients == pytest.approx(counted.gradients[role], rel=2e-3), role
                assert held.optimizer == pytest.approx(counted.optimizer[role], rel=4e-3), role
            else:
                assert held.weights == counted.weights[role], role
        phases = predicted_phases(case, memory)
        # By themselves, without the weights that would hide an error.
        for name in (name for name in phases if name.startswith("train")):
            assert phases[name] == pytest.approx(counted.phases[name], rel=0.1), name
        peak = memory.resident + max(phases[name] for name in counted.phases)
        assert peak == pytest.approx(counted.peak, rel=0.05)
        if case.choice.layout.vpp == 1:  # chunks are wrapped one by one: less is there twice
            start = counted.resident + counted.phases["start"]
            # One weight at a time goes through a copy on its way to fp32: here a weight is 2 % of all.
            assert memory.resident + phases["start"] == pytest.approx(start, rel=0.03)
