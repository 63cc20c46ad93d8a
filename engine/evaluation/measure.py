"""Measures of a policy's answers to held-out prompts, with confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.evaluation.confidence import ConfidenceInterval, mean_estimate, share_estimate
from glm_rlhf.engine.evaluation.scored_answers import ScoredAnswer, gather_answers
from glm_rlhf.engine.types import Rewards, Rollouts
from glm_rlhf.parallel.runtime.topology import Topology

WILSON, NORMAL = "Wilson 95 %", "mean ± 1.96 standard errors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Samples per prompt, and pass@k."""

    num_samples: int
    """Answers per prompt."""
    pass_k: tuple[int, ...]
    """Values of k for pass@k, each at most num_samples."""
    pass_reward: float
    """Smallest reward of an answer that passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measure of an evaluation."""

    name: str
    """Its metric's name, without `eval/`."""
    estimate: ConfidenceInterval
    """Its mean over prompts, with the interval."""
    interval: str
    """Kind of the interval: `WILSON` or `NORMAL`."""


def score_rollouts(
    rollouts: Rollouts,
    rewarder: Callable[[Rollouts], Rewards],
    tokenizer: Tokenizer | None,
    topology: Topology,
) -> list[ScoredAnswer]:
    """Return the answers of all ranks with their rewards, in the prompts' order, on all ranks.

    Every rank of the topology calls this; the world gathers.

    Raises:
        RewardError: a reward failed; on all ranks.
    """
    rewards = rewarder(rollouts)
    rollouts = replace(rollouts, excluded=rewards.excluded)
    return gather_answers(rollouts, rewards.totals_B(rollouts.starts), tokenizer, topology)


def measure(
    answers: Sequence[ScoredAnswer],
    settings: EvaluationSettings,
    *,
    against: Sequence[ScoredAnswer] | None = None,
) -> list[Measured]:
    """Return reward, win rate, pass@k and length, each a mean over prompts with its interval.

    The unit is the prompt, because its samples are not independent. A prompt of which an answer has no reward
    is excluded from all measures of rewards.

        win rate  = share of pairs (answer, other model's answer) of a prompt in which the first has the
                    higher reward; equal rewards count ½
        pass@k    = 1 - C(n - c, k) / C(n, k) for c of n samples that pass

    Args:
        answers: num_samples per prompt, in the prompts' order.
        settings: samples per prompt, and pass@k.
        against: another model's answers to the same prompts, as many per prompt; None: no win rate.

    Raises:
        ValueError: fewer than two prompts with rewards.

    Source of pass@k: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    groups = _by_prompt(answers, settings.num_samples)
    rewards = [[answer.reward for answer in group] for group in groups]
    scored = [i for i, of_prompt in enumerate(rewards) if None not in of_prompt]
    if len(scored) < 2:
        raise ValueError(f"{len(scored)} of {len(groups)} prompts have rewards, an interval needs at least 2")
    measures = [_mean("reward", [fmean(rewards[i]) for i in scored])]
    if against is not None:
        other_groups = _by_prompt(against, settings.num_samples)
        other_rewards = [[answer.reward for answer in group] for group in other_groups]
        both = [i for i in scored if None not in other_rewards[i]]
        measures.append(_share("win_rate", [_win_rate(rewards[i], other_rewards[i]) for i in both]))
        measures.append(_mean("reward_against", [fmean(other_rewards[i]) for i in both]))
    for k in settings.pass_k:
        num_passed = [sum(reward >= settings.pass_reward for reward in rewards[i]) for i in scored]
        measures.append(
            _share(f"pass@{k}", [pass_at_k(settings.num_samples, count, k) for count in num_passed])
        )
    lengths = [fmean(len(answer.tokens) for answer in group) for group in groups]
    measures.append(_mean("response_length", lengths))
    cut_shares = [fmean(not answer.is_finished for answer in group) for group in groups]
    measures.append(_share("cut_fraction", cut_shares))
    return measures


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the probability that at least one of k samples, drawn without replacement, passes."""
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def as_metrics(measures: Sequence[Measured]) -> dict[str, float]:
    """Return the measures as metrics of a step: mean, and both ends of the interval."""
    metrics = {}
    for measured in measures:
        name = f"eval/{measured.name}"
        estimate = measured.estimate
        metrics |= {name: estimate.mean, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
    return metrics


def _by_prompt(answers: Sequence[ScoredAnswer], num_samples: int) -> list[Sequence[ScoredAnswer]]:
    return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]


def _win_rate(rewards: Sequence[float], other_rewards: Sequence[float]) -> float:
    return fmean((mine > other) + (mine == other) / 2 for mine in rewards for other in other_rewards)


def _mean(name: str, values: Sequence[float]) -> Measured:
    return Measured(name=name, estimate=mean_estimate(values), interval=NORMAL)


def _share(name: str, values: Sequence[float]) -> Measured:
    return Measured(name=name, estimate=share_estimate(values), interval=WILSON)
