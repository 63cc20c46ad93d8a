"""The PPO experiments' reward, and where their curves reach a gain, by hand."""

import pytest

from benchmarks.learning.offset_task import FIRST_ID, LEVELS, Point, crossing, reward, run_ppo
from benchmarks.learning.reward_runs import random_policy
from glm_rlhf.engine.rewards.function import RewardRequest

FIRST_LEVEL = FIRST_ID + 16


def request(prompt: int, *answer: int) -> RewardRequest:
    return RewardRequest(
        prompt_tokens=(prompt, 60, 61),
        response_tokens=answer,
        prompt=None,
        response=None,
        is_finished=True,
        extra={},
    )


def test_a_reward_is_gold_plus_the_prompts_offset():
    low, middle, high = FIRST_LEVEL, FIRST_LEVEL + LEVELS // 2, FIRST_LEVEL + LEVELS - 1
    good, poor = FIRST_ID, 50
    asked = [request(low, good, poor), request(middle, good, good), request(high, poor, poor, poor, good)]
    assert reward(asked) == [0.5 - 1, 1.0, 0.25 + 1]


def points(golds: list[float]) -> list[Point]:
    return [
        Point(gold=gold, kl=10 * gold, reward_spread=0.0, explained_variance=0.0, reward_mean=0.0)
        for gold in golds
    ]


def test_a_gain_is_found_between_two_means_of_five():
    # Means of five: 0.2 at iteration 2, 0.3 at 3 and so on; the gold began at 0, so +0.25 lies between.
    golds = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    iterations, kl = crossing(points(golds), 0.25)
    assert (iterations, kl) == (pytest.approx(2.5), pytest.approx(2.5))
    with pytest.raises(ValueError, match=r"never was 0\.9 above"):
        crossing(points(golds), 0.9)


def test_the_baseline_takes_the_prompts_offset_out_of_the_reward(tmp_path):
    policy = random_policy(tmp_path / "policy", seed=1)
    off, on = (run_ppo(policy, seed=1, iterations=1, reference_baseline=on)[0] for on in (False, True))
    # The same answers: the same gold, and no distance yet.
    assert off.gold == on.gold
    assert off.kl == on.kl == pytest.approx(0.0, abs=1e-5)
    # Offsets spread by 0.65; what is left is the spread of answers, of four and of one: about 0.17.
    assert on.reward_spread < 0.35 < off.reward_spread
    assert abs(on.reward_mean) < 0.15
