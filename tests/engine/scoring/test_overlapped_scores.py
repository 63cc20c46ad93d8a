"""Scores of answers that ended early: the same experience as scored at the end, in turns else idle."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from little_memory import little_memory
from reward_rules import nan_after_long_prompts
from tiny_models import make_model, save_folder
from tiny_ppo import make_roles, prompts

from glm_rlhf.engine.rl.algorithms.ppo import PPO
from glm_rlhf.engine.types import Experience
from glm_rlhf.parallel.runtime.spans import recording
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

SCORED = ("rewards_B", "ref_logprobs_T", "values_T", "old_logprobs_T", "advantages_T")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


def early_and_late(folder: Path, axes: dict) -> tuple[Counter, Counter, list[float]]:
    """Early passes with and without them, and how far each tensor of the experience differs.

    Some answers have no reward and are excluded.
    """
    with open_topology(Layout(**axes)) as topology:
        reward_model, _ = load_model(folder, topology, role="reward", dtype=torch.float32, seed=8)
        engine = make_roles(
            folder, topology, nan_after_long_prompts, skip_reward_failures=True, reward_model=reward_model
        )
        engine.answers = replace(engine.answers, stop_check=lambda tokens: len(tokens) > tokens[0] % 12)
        progress = engine.progress()
        overlapped, first = _experience(engine)
        engine.set_progress(progress)
        engine.algorithm = PPO(replace(engine.algorithm.section, overlap_scoring=False))
        late, second = _experience(engine)
        assert torch.equal(first.rollouts.tokens_T, second.rollouts.tokens_T)
        assert first.rollouts.excluded == second.rollouts.excluded
        assert first.rollouts.excluded
        apart = [float((getattr(first, name) - getattr(second, name)).abs().max()) for name in SCORED]
    return overlapped, late, apart


def _experience(engine) -> tuple[Counter, Experience]:
    passes: Counter = Counter()

    def record(name: str, _start: float, _end: float) -> None:
        if name.startswith("overlapped"):
            passes[name] += 1

    with recording(record):
        experience = engine.make_experience(engine.generate(prompts()))
    return passes, experience


@pytest.mark.parametrize(
    "axes", [{"tp": 2, "pp": 2}, pytest.param({"pp": 4}, marks=pytest.mark.slow)], ids=str
)
def test_scored_early_or_late_is_the_same_experience(ranks, folder, axes):
    for overlapped, late, apart in ranks.run(early_and_late, folder, axes):
        assert not late
        assert set(overlapped) == {"overlapped reference", "overlapped critic", "overlapped reward"}
        assert overlapped["overlapped reference"] >= 2
        # Products of other numbers of rows are cut into other blocks: roundings of fp32.
        assert max(apart) <= 1e-5, dict(zip(SCORED, apart, strict=True))


def scores_of_other_rollouts(folder: Path) -> float:
    """How far values of rollouts that are not the newest differ from those scored at the end."""
    with open_topology(Layout(tp=2, pp=2)) as topology:
        engine = make_roles(folder, topology)
        rollouts = engine.generate(prompts())
        engine.generate(prompts()[::-1])
        found = engine.make_experience(rollouts)
        expected = engine.make_experience(rollouts)
        return float((found.values_T - expected.values_T).abs().max())


def test_early_scores_of_other_rollouts_are_not_taken(ranks, folder):
    assert ranks.run(scores_of_other_rollouts, folder) == [0.0] * 4


def without_memory(folder: Path) -> tuple[int, float]:
    """Early passes that found no memory on the last stage, and how far values are from those without them."""
    with open_topology(Layout(tp=2, pp=2)) as topology:
        engine = make_roles(folder, topology)
        engine.answers = replace(engine.answers, stop_check=lambda tokens: len(tokens) > tokens[0] % 12)
        with little_memory(engine.models["critic"][0], 0 if topology.is_last_stage else 10**6) as met:
            rollouts = engine.generate(prompts())
        found = engine.make_experience(rollouts)
        expected = engine.make_experience(rollouts)
        return len(met), float((found.values_T - expected.values_T).abs().max())


def test_where_an_early_pass_finds_no_memory_the_answers_are_scored_at_the_end(ranks, folder):
    found = ranks.run(without_memory, folder)
    assert [apart for _, apart in found] == [0.0] * 4
    assert [bool(count) for count, _ in found] == [False, False, True, True]
