"""Rewards of PPO: on which tokens, minus which baseline, and which answers are excluded, on all ranks."""

import math
from dataclasses import replace

import pytest
import torch
from reward_rules import low_id_tokens

from glm_rlhf.engine.rewards.combined import CombinedReward
from glm_rlhf.engine.rewards.function import RewardError
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


def make_rollouts(first_id: int = 0) -> Rollouts:
    """Three sequences of prompts (i,), (i + 1, 9), (i + 2,) and answers of 2, 1 and 3 tokens."""
    prompts = [(first_id,), (first_id + 1, 9), (first_id + 2,)]
    answers = [(4, 50), (60,), (50, 5, 6)]
    return Rollouts(
        tokens_T=torch.tensor(
            [t for pair in zip(prompts, answers, strict=True) for part in pair for t in part]
        ),
        lengths=(3, 3, 4),
        prompt_lengths=(1, 2, 1),
        prompts=tuple(PromptInput(tokens=prompt, extra={}) for prompt in prompts),
        is_finished=(True,) * 3,
        logprobs_T=torch.zeros(10),
        temperature=1.0,
        indices=(0, 1, 2),
        num_global=3,
    )


def first_prompt_id(requests) -> list[float]:
    """The first id of the prompt; NaN where it is 1 or 11."""
    return [math.nan if r.prompt_tokens[0] % 10 == 1 else float(r.prompt_tokens[0]) for r in requests]


def test_token_rewards_are_placed_on_their_tokens():
    with open_topology(Layout()) as topology:
        terms = CombinedReward(
            topology=topology, micro_batch_tokens=8, function=low_id_tokens, function_weight=0.5
        )
        rewards = terms(make_rollouts())
    assert rewards.token_rewards_T.tolist() == [0, 0.5, 0, 0, 0, 0, 0, 0, 0.5, 0.5]
    assert rewards.rewards_B.tolist() == [0.0] * 3
    assert rewards.totals_B(make_rollouts().starts).tolist() == [0.5, 0.0, 1.0]
    assert not rewards.excluded


def test_the_baseline_is_the_whole_reward_of_the_references_answer():
    num_prompts = []

    def answer(prompts):
        num_prompts.append(len(prompts))
        return replace(make_rollouts(), tokens_T=torch.full((10,), 3))  # every token has a reward of 1

    with open_topology(Layout()) as topology:
        terms = CombinedReward(
            topology=topology, micro_batch_tokens=8, function=low_id_tokens, answer_by_reference=answer
        )
        rewards = [terms(make_rollouts()) for _ in range(2)]
    assert num_prompts == [3]
    for of_call in rewards:
        assert of_call.totals_B(make_rollouts().starts).tolist() == [1 - 2, 0 - 1, 2 - 3]


def test_an_answer_without_a_baseline_is_excluded_until_there_is_one():
    scores = iter([[1.0] * 3, [None, 0.25, 0.5], [1.0] * 3, [0.75] * 3])

    with open_topology(Layout()) as topology:
        terms = CombinedReward(
            topology=topology,
            micro_batch_tokens=8,
            function=lambda requests: next(scores),
            skip_failures=True,
            answer_by_reference=lambda prompts: make_rollouts(),
        )
        first, second = terms(make_rollouts()), terms(make_rollouts())
    assert first.excluded == {0}
    assert first.rewards_B.tolist() == [0.0, 0.75, 0.5]
    assert not second.excluded
    assert second.rewards_B.tolist() == [0.25, 0.75, 0.5]


def rewards_on_ranks() -> tuple:
    """On each rank of tp 2 × dp 2: the rewards with failures skipped, and the errors where they are not."""
    with open_topology(Layout(tp=2)) as topology:
        rollouts = make_rollouts(first_id=10 * topology.dp_rank)
        skipping = CombinedReward(
            topology=topology, micro_batch_tokens=8, function=first_prompt_id, skip_failures=True
        )
        rewards = skipping(rollouts)
        strict = CombinedReward(topology=topology, micro_batch_tokens=8, function=first_prompt_id)
        nothing = CombinedReward(
            topology=topology,
            micro_batch_tokens=8,
            function=lambda requests: [None] * len(requests),
            skip_failures=True,
        )
        messages = []
        for terms in (strict, nothing):
            try:
                terms(rollouts)
            except RewardError as error:
                messages.append(str(error))
        return topology.dp_rank, rewards.rewards_B.tolist(), rewards.excluded, messages


def test_ranks_exclude_the_same_answers_and_fail_with_the_same_message(ranks):
    results = ranks.run(rewards_on_ranks)
    for dp_rank, rewards, excluded, messages in results:
        assert rewards == [10.0 * dp_rank, 0.0, 10.0 * dp_rank + 2]
        assert excluded == {1}
        assert messages == results[0][-1]
    strict, nothing = results[0][-1]
    assert "reward 1 of 3, of the answer (60,) to the prompt (1, 9): it is nan" in strict
    assert "none of 6 answers has a reward" in nothing


def test_a_reward_without_model_and_function_is_an_error():
    with open_topology(Layout()) as topology, pytest.raises(ValueError, match="a reward model or a function"):
        CombinedReward(topology=topology, micro_batch_tokens=8)
