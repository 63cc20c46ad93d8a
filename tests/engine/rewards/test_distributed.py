"""A reward function asked early: the same rewards, faults and words as when it is asked at the end."""

import math

import pytest
import torch

from glm_rlhf.engine.rewards.distributed import RewardDispatcher
from glm_rlhf.engine.rewards.function import RewardError
from glm_rlhf.engine.rollout.scheduling.requests import Completion
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

ANSWERS = ((4, 50), (60,), (50, 5, 6))


def make_rollouts(dp_rank: int) -> Rollouts:
    """Three answers to the prompts (0,), (1,) and (2,)."""
    prompts = tuple(PromptInput(tokens=(number,), extra={}) for number in range(3))
    tokens = [t for prompt, answer in zip(prompts, ANSWERS, strict=True) for t in (*prompt.tokens, *answer)]
    return Rollouts(
        tokens_T=torch.tensor(tokens),
        lengths=(3, 2, 4),
        prompt_lengths=(1, 1, 1),
        prompts=prompts,
        is_finished=(True, False, True),
        logprobs_T=torch.zeros(9),
        temperature=1.0,
        indices=tuple(range(3 * dp_rank, 3 * dp_rank + 3)),
        num_global=6,
    )


def completion(number: int, is_finished: bool) -> Completion:
    tokens, reason = ANSWERS[number], "stop" if is_finished else "length"
    zeros = (0.0,) * len(tokens)
    return Completion(
        request=number,
        sample=0,
        tokens=tokens,
        logprobs=zeros,
        untempered_logprobs=zeros,
        finish_reason=reason,
    )


def judge_on_ranks() -> list:
    """On tp 2 × dp 2: what two of three answers asked early bring, without faults, with one, with all."""
    told = []
    with open_topology(Layout(tp=2)) as topology:
        rollouts, seen = make_rollouts(topology.dp_rank), []

        def rule(requests) -> list[float]:
            seen.extend((r.prompt_tokens, r.response_tokens, r.is_finished) for r in requests)
            return [float(sum(r.response_tokens)) for r in requests]

        def breaks(requests) -> list[float]:
            return [math.nan if r.prompt_tokens == (1,) else 1.0 for r in requests]

        for function, masks in ((rule, False), (breaks, True), (breaks, False)):
            judge = RewardDispatcher(
                function, topology=topology, tokenizer=None, skip_failures=masks, concurrency=1
            )
            for number in (2, 0):
                judge.ask_ahead(
                    rollouts.indices[number], rollouts.prompts[number], completion(number, is_finished=True)
                )
            try:
                told.append([str(reward) for reward in judge(rollouts, uses_overlapped=True)])
            except RewardError as error:
                told.append(str(error))
        told.append(sorted(seen))
    return told


def test_asked_early_or_not_all_ranks_hear_the_same(ranks):
    found = ranks.run(judge_on_ranks)
    for rewards, masked, said, _ in found:
        assert rewards == ["54.0", "60.0", "61.0"]
        assert (masked[0], masked[2]) == ("1.0", "1.0")
        assert "it is nan" in masked[1]
        assert said == found[0][2]
        assert said.startswith("reward 1 of 3, of the answer (60,) to the prompt (1,): it is nan")
    asked = [((0,), (4, 50), True), ((1,), (60,), False), ((2,), (50, 5, 6), True)]
    assert [seen for *_, seen in found] == [asked, [], asked, []]  # one of two ranks asks, each answer once


@pytest.mark.parametrize("concurrency", [0, 1])
def test_other_rollouts_than_those_asked_early_are_judged_anew(concurrency):
    with open_topology(Layout()) as topology:
        judge = RewardDispatcher(
            lambda requests: [float(sum(r.response_tokens)) for r in requests],
            topology=topology,
            tokenizer=None,
            skip_failures=False,
            concurrency=concurrency,
        )
        rollouts = make_rollouts(0)
        judge.ask_ahead(0, rollouts.prompts[0], completion(2, is_finished=True))
        assert judge(rollouts) == [54.0, 60.0, 61.0]
