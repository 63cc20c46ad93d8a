"""Policy and critic in one pipeline schedule: the steps that each takes by itself, with little memory too."""

import contextlib

import pytest
import torch
from little_memory import little_memory
from tiny_models import make_model, save_folder
from tiny_ppo import make_roles, prompts

from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.rl.mini_batches import learners, mini_batches
from glm_rlhf.engine.training.step import take_step
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

# Steps of about the gradient's size: roundings of it stay roundings of the weights.
STEPS = AdamSettings(lr=0.1, epsilon=1.0, clip_grad=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


def steps(folder, axes):
    """Critic's and policy's steps, this rank's weights after them, and the token counts that had no room."""
    found = {}
    with open_topology(Layout(**axes)) as topology:
        experience = None
        for way in ("apart", "together", "little memory"):
            roles = make_roles(folder, topology, policy_adam=STEPS, critic_adam=STEPS)
            experience = experience or roles.make_experience(roles.generate(prompts()))
            taken = []
            has_little = way == "little memory" and topology.pp_rank == 1 and topology.dp_rank == 0
            memory = (
                little_memory(roles.models["policy"][0], 30) if has_little else contextlib.nullcontext([])
            )
            with memory as met:
                for part in mini_batches(
                    experience,
                    roles.algorithm,
                    micro_batch_tokens=roles.micro_batch_tokens,
                    seed=1,
                    topology=topology,
                ):
                    both = list(learners(roles.states, experience, part, roles.algorithm).values())
                    for group in [[one] for one in both] if way == "apart" else [both]:
                        taken += take_step(group, topology=topology, dtype=torch.float32).roles
            reported = [torch.tensor(step.grad_norm) for step in taken]
            reported += [step.terms[0].sums for step in taken]
            weights = [
                p.detach().clone()
                for c in (*roles.models["policy"], *roles.models["critic"])
                for p in c.parameters()
            ]
            limits = [chunks[0].most_tokens for chunks in (roles.models["policy"], roles.models["critic"])]
            found[way] = (reported, weights, list(met), has_little, limits)
    return found


def test_steps_are_those_that_each_takes_by_itself(ranks, folder):
    for answer in ranks.run(steps, folder, {"pp": 2}):
        reported, weights, *_ = answer["apart"]
        for way in ("together", "little memory"):
            others, changed, met, has_little, limits = answer[way]
            assert bool(met) == has_little
            assert limits[0] == limits[1]
            assert ("training" in limits[0]) == (way == "little memory")
            for a, b in zip(others, reported, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
            assert max(float((a - b).abs().max()) for a, b in zip(changed, weights, strict=True)) <= 1e-6


def test_seconds_of_a_shared_phase_are_parted():
    phases = Phases()
    with phases.phase("critic"):
        pass
    before = phases.seconds["timing_s/critic"]
    with phases.shared("steps", lambda seconds: {"policy": 3.0, "critic": 1.0}):
        pass
    assert phases.seconds == {"timing_s/critic": before + 1.0, "timing_s/policy": 3.0}
