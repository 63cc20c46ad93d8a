"""What a policy's answers to held-out prompts come to, with confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.evaluation.confidence import ConfidenceInterval, mean_estimate, share_estimate
from glm_rlhf.engine.evaluation.scored_answers import JudgedAnswer, gather_answers
from glm_rlhf.engine.types import Rewards, Rollouts
from glm_rlhf.parallel.runtime.topology import Topology

WILSON, NORMAL = "Wilson 95 %", "mean ± 1.96 standard errors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How answers are counted."""

    num_samples: int
    """Answers to each prompt."""
    pass_k: tuple[int, ...]
    """The k of each pass@k, at most num_samples."""
    pass_reward: float
    """An answer passes when its reward is at least this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure of an evaluation."""

    name: str
    """As it stands in the metrics, without `eval/`."""
    estimate: ConfidenceInterval
    """Its mean over prompts and the interval."""
    interval: str
    """How the interval was made."""


def judge_rollouts(
    rollouts: Rollouts,
    rewarder: Callable[[Rollouts], Rewards],
    tokenizer: Tokenizer | None,
    topology: Topology,
) -> list[JudgedAnswer]:
    """Return the answers of all ranks with their rewards, by prompt, on every rank; all of them call this.

    Raises:
        RewardError: a reward failed; on every rank.
    """
    rewards = rewarder(rollouts)
    rollouts = replace(rollouts, excluded=rewards.excluded)
    return gather_answers(rollouts, rewards.totals_B(rollouts.starts), tokenizer, topology)


def measure(
    answers: Sequence[JudgedAnswer],
    settings: EvaluationSettings,
    *,
    against: Sequence[JudgedAnswer] | None = None,
) -> list[Measured]:
    """Return reward, win rate, pass@k and length, each a mean over prompts with its interval.

    A prompt is the unit: its samples are not independent. Where an answer of a prompt has no reward, the
    prompt is left out of what is made of rewards.

        win rate  = share of pairs (ours, theirs) of a prompt in which ours has the higher reward; equal: ½
        pass@k    = 1 - C(n - c, k) / C(n, k) for c of n samples that pass

    Args:
        answers: num_samples a prompt, in the prompts' order.
        settings: how they are counted.
        against: another model's to the same prompts, as many each; None leaves the win rate out.

    Raises:
        ValueError: fewer than two prompts with rewards.

    Source of pass@k: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    groups = _by_prompt(answers, settings.num_samples)
    judged = [[one.reward for one in group] for group in groups]
    known = [place for place, rewards in enumerate(judged) if None not in rewards]
    if len(known) < 2:
        raise ValueError(f"{len(known)} of {len(groups)} prompts have rewards, an interval needs at least 2")
    found = [_mean("reward", [fmean(judged[place]) for place in known])]
    if against is not None:
        theirs = [[one.reward for one in group] for group in _by_prompt(against, settings.num_samples)]
        both = [place for place in known if None not in theirs[place]]
        found.append(_share("win_rate", [_wins(judged[place], theirs[place]) for place in both]))
        found.append(_mean("reward_against", [fmean(theirs[place]) for place in both]))
    for k in settings.pass_k:
        passed = [sum(reward >= settings.pass_reward for reward in judged[place]) for place in known]
        found.append(_share(f"pass@{k}", [pass_at_k(settings.num_samples, right, k) for right in passed]))
    lengths = [fmean(len(one.tokens) for one in group) for group in groups]
    found.append(_mean("response_length", lengths))
    found.append(_share("cut_fraction", [fmean(not one.is_finished for one in group) for group in groups]))
    return found


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the chance that at least one of k samples, drawn without putting back, is right."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def as_metrics(measured: Sequence[Measured]) -> dict[str, float]:
    """Return the figures as metrics of a step: mean, and the ends of the interval."""
    metrics = {}
    for one in measured:
        name = f"eval/{one.name}"
        estimate = one.estimate
        metrics |= {name: estimate.mean, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
    return metrics


def _by_prompt(answers: Sequence[JudgedAnswer], num_samples: int) -> list[Sequence[JudgedAnswer]]:
    return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]


def _wins(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return fmean((mine > other) + (mine == other) / 2 for mine in ours for other in theirs)


def _mean(name: str, values: Sequence[float]) -> Measured:
    return Measured(name=name, estimate=mean_estimate(values), interval=NORMAL)


def _share(name: str, values: Sequence[float]) -> Measured:
    return Measured(name=name, estimate=share_estimate(values), interval=WILSON)
