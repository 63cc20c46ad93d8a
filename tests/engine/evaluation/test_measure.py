"""Measures of an evaluation: computed by hand, and which answers are excluded."""

import itertools

import pytest

from glm_rlhf.engine.evaluation.measure import EvaluationSettings, as_metrics, measure, pass_at_k
from glm_rlhf.engine.evaluation.scored_answers import ScoredAnswer


def answers(*rewards: float | None, length: int = 2) -> list[ScoredAnswer]:
    return [
        ScoredAnswer(
            prompt_tokens=(1,),
            tokens=(4,) * length,
            prompt=None,
            text=None,
            reward=reward,
            is_finished=reward != 0.0,
        )
        for reward in rewards
    ]


def means(measures) -> dict[str, float]:
    return {one.name: one.estimate.mean for one in measures}


def test_figures_by_hand():
    settings = EvaluationSettings(num_samples=2, pass_k=(1, 2), pass_reward=1.0)
    policy_answers = answers(1.0, 0.0, 0.5, 0.5, 2.0, 1.0)
    reference_answers = answers(0.5, 0.0, 0.5, 0.5, 3.0, 1.5)
    measures = measure(policy_answers, settings, against=reference_answers)
    # Pairs of prompt 1: 1 > .5, 1 > 0, 0 < .5, 0 = 0; of prompt 2 all equal; of prompt 3 one of four won.
    assert means(measures) == pytest.approx(
        {
            "reward": (0.5 + 0.5 + 1.5) / 3,
            "win_rate": (2.5 / 4 + 2 / 4 + 1 / 4) / 3,
            "reward_against": (0.25 + 0.5 + 2.25) / 3,
            "pass@1": (1 / 2 + 0 + 1) / 3,
            "pass@2": (1 + 0 + 1) / 3,
            "response_length": 2.0,
            "cut_fraction": (1 / 2 + 0 + 0) / 3,
        }
    )
    for one in measures:
        assert one.estimate.low <= one.estimate.mean <= one.estimate.high
        assert one.estimate.num_units == 3  # prompts, not samples
    assert {one.interval for one in measures if one.name in ("win_rate", "pass@1")} == {"Wilson 95 %"}


def test_against_itself_nobody_wins():
    settings = EvaluationSettings(num_samples=3, pass_k=(), pass_reward=1.0)
    policy_answers = answers(1.0, 2.0, 3.0, -1.0, 0.5, 0.0)
    assert means(measure(policy_answers, settings, against=policy_answers))["win_rate"] == pytest.approx(0.5)


def test_prompts_without_a_reward_are_excluded_from_measures_of_rewards():
    settings = EvaluationSettings(num_samples=1, pass_k=(1,), pass_reward=1.0)
    measures = measure(
        answers(1.0, None, 1.0, 0.0), settings, against=[*answers(0.0, 5.0), *answers(None, 1.0)]
    )
    named = {one.name: one.estimate for one in measures}
    assert (named["reward"].mean, named["reward"].num_units) == (pytest.approx(2 / 3), 3)
    assert (named["win_rate"].mean, named["win_rate"].num_units) == (0.5, 2)
    assert named["response_length"].num_units == 4
    with pytest.raises(ValueError, match="1 of 3 prompts have rewards"):
        measure(answers(1.0, None, None), settings)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(k):
    samples = [True, False, False, True, False]
    draws = list(itertools.combinations(samples, k))
    assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_metrics_have_the_ends_of_the_interval():
    settings = EvaluationSettings(num_samples=1, pass_k=(), pass_reward=1.0)
    metrics = as_metrics(measure(answers(0.5, 1.5, 1.0), settings))
    assert metrics["eval/reward"] == pytest.approx(1.0)
    assert metrics["eval/reward/low"] == pytest.approx(1.0 - 1.959964 * 0.5 / 3**0.5)
    assert metrics["eval/reward/high"] == pytest.approx(1.0 + 1.959964 * 0.5 / 3**0.5)
