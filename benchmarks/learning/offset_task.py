"""PPO on a task whose reward has an offset per prompt, and its curves of gold and KL.

The gold of an answer is its share of good tokens. The reward is the gold plus an offset that the prompt's
first token names: the critic can learn it, a reference's answer to the same prompt has it too.
"""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.learning.outcome import Claim, compare
from benchmarks.learning.planted_pairs import FIRST_ID, NUM_IDS, quality_of
from benchmarks.learning.reward_runs import random_policy
from glm_rlhf.engine.config.rl import (
    CriticSection,
    PPOConfig,
    PPOPromptsSection,
    PPORewardSection,
    PPOSection,
    PPOTrainSection,
)
from glm_rlhf.engine.config.sections import GenerationSection, ModelSection
from glm_rlhf.engine.config.training import OptimizerSection, TrainingRunSection
from glm_rlhf.engine.rewards.function import RewardRequest
from glm_rlhf.engine.rl.engine import PPOEngine
from glm_rlhf.engine.types import Experience, PromptInput

PROMPTS, SAMPLES, ANSWER_TOKENS = 16, 4, 8
"""Prompts per iteration, answers to each, longest answer in tokens."""
LEVELS = 9
"""Offsets go from -1 to 1 in so many steps; a good answer earns at most 1 more than a poor one."""
GAINS = (0.2, 0.4)
"""Of the gold above its beginning, at which arms are compared."""
LR = 1e-3
KL_COEF = 0.01
_LEVEL_IDS = range(FIRST_ID + 16, FIRST_ID + 16 + LEVELS)
_WINDOW = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Figures of one iteration, before its update."""

    gold: float
    """Mean share of good tokens."""
    kl: float
    """Mean of log π − log π_ref over answers, nats per sequence."""
    reward_mean: float
    """Mean reward that PPO learned from: minus the baseline where there is one."""
    reward_spread: float
    """Standard deviation, over prompts, of the mean reward that PPO learned from."""
    explained_variance: float
    """Share of the returns' variance that the critic's values explain."""


def reward(requests: Sequence[RewardRequest]) -> list[float]:
    """Return gold plus offset: the reward function."""
    return [quality_of(request.response_tokens) + _offset(request.prompt_tokens) for request in requests]


def run_ppo(
    policy: Path, *, seed: int, iterations: int, reference_baseline: bool, critic_warmup: int = 0
) -> list[Point]:
    """Return one point per iteration of PPO from `policy`, which is its reference too.

    Args:
        policy: Hugging Face folder.
        seed: of prompts, answers and mini-batches.
        iterations: of 64 answers each.
        reference_baseline: `ppo.reference_baseline`.
        critic_warmup: `critic.warmup_iterations`.
    """
    config = PPOConfig(
        run=TrainingRunSection(name="ppo", output=str(policy.parent / "ppo"), seed=seed),
        model=ModelSection(path=str(policy)),
        critic=CriticSection(lr=LR, warmup_iterations=critic_warmup),
        reward=PPORewardSection(function=f"{__name__}:reward"),
        data=PPOPromptsSection(path="none: prompts are sampled"),
        generation=GenerationSection(max_new_tokens=ANSWER_TOKENS, num_samples=SAMPLES, max_batch=64),
        optimizer=OptimizerSection(lr=LR),
        train=PPOTrainSection(steps=iterations, micro_batch_tokens=4096, dtype="fp32"),
        ppo=PPOSection(minibatches=2, kl_coef=KL_COEF, reference_baseline=reference_baseline),
    )
    points = []
    with contextlib.redirect_stderr(io.StringIO()), PPOEngine(config) as engine:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(iterations):
            experience = engine.make_experience(engine.generate(_draw_prompts(generator)))
            metrics = engine.update(experience)
            points.append(_point(experience, metrics["critic/vf_explained_var"]))
    return points


def points_of(seed: int, iterations: int, **options: Any) -> list[Point]:
    """Return the points of `run_ppo` from a policy of random weights, with `options` of it."""
    with tempfile.TemporaryDirectory() as folder:
        policy = random_policy(Path(folder) / "policy", seed=seed)
        return run_ppo(policy, seed=seed, iterations=iterations, **options)


def faster_claims(arm: str, against: str, text: str, figure: str) -> tuple[Claim, ...]:
    """Return the claims that an arm has less KL at each gain of gold, and reaches it sooner by `figure`."""
    return compare(
        arm,
        against,
        *(("less KL at the same gold", f"KL at gold +{gain}", "lower") for gain in GAINS),
        *((text, f"{figure} to gold +{gain}", "lower") for gain in GAINS),
    )


def crossing(points: Sequence[Point], gain: float) -> tuple[float, float]:
    """Return (iterations, KL) at which gold first is `gain` above its beginning.

    Gold and KL are means over five iterations; between two of them the way is taken to be straight.

    Raises:
        ValueError: it never is.
    """
    golds, kls = (_smooth([getattr(point, name) for point in points]) for name in ("gold", "kl"))
    wanted = points[0].gold + gain
    for index, (before, after) in enumerate(itertools.pairwise(golds)):
        if before < wanted <= after:
            share = (wanted - before) / (after - before)
            return index + share + _WINDOW // 2, kls[index] + share * (kls[index + 1] - kls[index])
    raise ValueError(
        f"gold began at {points[0].gold:.3f} and never was {gain} above; give it more iterations"
    )


def _smooth(values: Sequence[float]) -> list[float]:
    return [fmean(values[start : start + _WINDOW]) for start in range(len(values) - _WINDOW + 1)]


def _point(experience: Experience, explained_variance: float) -> Point:
    rollouts = experience.rollouts
    by_prompt = experience.rewards_B.view(-1, SAMPLES)
    answers = [rollouts.answer(index).tolist() for index in range(rollouts.num_sequences)]
    ratio_T = (experience.old_logprobs_T - experience.ref_logprobs_T) * rollouts.action_mask_T
    return Point(
        gold=fmean(map(quality_of, answers)),
        kl=float(ratio_T.sum()) / rollouts.num_sequences,
        reward_mean=float(experience.rewards_B.mean()),
        reward_spread=float(by_prompt.mean(1).std()),
        explained_variance=explained_variance,
    )


def _offset(prompt: Sequence[int]) -> float:
    return 2 * (prompt[0] - _LEVEL_IDS.start) / (LEVELS - 1) - 1


def _draw_prompts(generator: torch.Generator) -> list[PromptInput]:
    levels = torch.randint(_LEVEL_IDS.start, _LEVEL_IDS.stop, (PROMPTS, 1), generator=generator)
    others = torch.randint(_LEVEL_IDS.stop, NUM_IDS, (PROMPTS, 3), generator=generator)
    return [PromptInput(tokens=tuple(tokens), extra={}) for tokens in torch.cat((levels, others), 1).tolist()]
