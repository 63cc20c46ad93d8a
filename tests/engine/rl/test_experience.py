"""Rewards that do not vary are learned from as they are, and break nothing."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_folder
from tiny_ppo import make_roles, prompts

from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


def constant(requests) -> list[float]:
    return [0.7] * len(requests)


def weights_of(engine: PPORoles) -> list[torch.Tensor]:
    """Copies of what the optimizers change."""
    chunks = (engine.models["policy"][0], engine.models["critic"][0])
    return [weight.detach().clone() for chunk in chunks for _, weight in chunk.named_weights()]


def test_rewards_that_do_not_vary_are_learned_from_without_a_fault(folder):
    """With whitening and without a KL term: then returns do not vary, and what critics explain is unknown."""
    settings = {"whiten": True, "kl_coef": 0.0, "kl_target": None, "lam": 1.0}
    with open_topology(Layout()) as topology:
        engine = make_roles(folder, topology, constant, settings=settings)
        metrics = [engine.update(engine.make_experience(engine.generate(prompts()))) for _ in range(2)]
    for one in metrics:
        assert one["reward/minus_baseline/mean"] == pytest.approx(0.7)
        assert one["reward/minus_baseline/std"] < 1e-3
        assert {name for name, value in one.items() if not math.isfinite(value)} <= {
            "critic/vf_explained_var"
        }
        assert one["actor/grad_norm"] > 0
    assert metrics[1]["critic/vf_loss"] < metrics[0]["critic/vf_loss"]


def test_a_reference_baseline_of_rewards_that_do_not_vary_leaves_zero(folder):
    """A critic of 0 and rewards of 0 give advantages of 0: whitening divides by no zero."""
    with open_topology(Layout()) as topology:
        settings = {"whiten": True, "kl_coef": 0.0, "kl_target": None}
        engine = make_roles(folder, topology, constant, settings=settings, uses_reference_baseline=True)
        with torch.no_grad():
            engine.models["critic"][0].value_head.weight.zero_()
        before = weights_of(engine)
        experience = engine.make_experience(engine.generate(prompts()))
        assert experience.rewards_B.tolist() == [0.0] * 16
        assert experience.advantages_T.count_nonzero() == 0
        metrics = engine.update(experience)
        after = weights_of(engine)
    assert metrics["actor/grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
