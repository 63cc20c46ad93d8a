"""Answers submitted during generation get the same rewards, failures and errors as those scored after it."""

import contextlib
import io
import math
import os
import signal
import threading

import pytest
import torch

from glm_rlhf.engine.rewards.distributed import RewardDispatcher
from glm_rlhf.engine.rewards.function import RewardError
from glm_rlhf.engine.rollout.scheduling.requests import Completion
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.preemption import Preempted, handle_preemption_signals
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


def rewards_on_ranks() -> list:
    """On tp 2 × dp 2, two of three answers submitted early: without failures, one skipped, one raised."""
    outcomes = []
    with open_topology(Layout(tp=2)) as topology:
        rollouts, seen = make_rollouts(topology.dp_rank), []

        def rule(requests) -> list[float]:
            seen.extend((r.prompt_tokens, r.response_tokens, r.is_finished) for r in requests)
            return [float(sum(r.response_tokens)) for r in requests]

        def breaks(requests) -> list[float]:
            return [math.nan if r.prompt_tokens == (1,) else 1.0 for r in requests]

        for function, skips in ((rule, False), (breaks, True), (breaks, False)):
            dispatcher = RewardDispatcher(
                function,
                topology=topology,
                tokenizer=None,
                skip_failures=skips,
                concurrency=1,
                function_timeout_s=600,
            )
            for number in (2, 0):
                dispatcher.submit(
                    rollouts.indices[number], rollouts.prompts[number], completion(number, is_finished=True)
                )
            try:
                outcomes.append([str(reward) for reward in dispatcher(rollouts, uses_overlapped=True)])
            except RewardError as error:
                outcomes.append(str(error))
        outcomes.append(sorted(seen))
    return outcomes


def test_submitted_early_or_not_all_ranks_get_the_same(ranks):
    results = ranks.run(rewards_on_ranks)
    for rewards, skipped, message, _ in results:
        assert rewards == ["54.0", "60.0", "61.0"]
        assert (skipped[0], skipped[2]) == ("1.0", "1.0")
        assert "it is nan" in skipped[1]
        assert message == results[0][2]
        assert message.startswith("reward 1 of 3, of the answer (60,) to the prompt (1,): it is nan")
    requests = [((0,), (4, 50), True), ((1,), (60,), False), ((2,), (50, 5, 6), True)]
    # One of two ranks calls the function, once per answer.
    assert [seen for *_, seen in results] == [requests, [], requests, []]


@pytest.mark.parametrize("concurrency", [0, 1])
def test_rollouts_that_were_not_submitted_are_scored_now(concurrency):
    with open_topology(Layout()) as topology:
        dispatcher = RewardDispatcher(
            lambda requests: [float(sum(r.response_tokens)) for r in requests],
            topology=topology,
            tokenizer=None,
            skip_failures=False,
            concurrency=concurrency,
            function_timeout_s=600,
        )
        rollouts = make_rollouts(0)
        dispatcher.submit(0, rollouts.prompts[0], completion(2, is_finished=True))
        assert dispatcher(rollouts) == [54.0, 60.0, 61.0]


def outcome_of(dispatcher: RewardDispatcher, rollouts: Rollouts) -> tuple[str, str]:
    """Return the rewards or the error, and what was written to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            found = str(dispatcher(rollouts))
        except (RewardError, Preempted) as error:
            found = f"{type(error).__name__}: {error}"
    return found, said.getvalue()


def waits_on_ranks() -> dict[str, tuple[str, str]]:
    """On tp 2 × dp 2: a signal to a rank that calls nothing, a call past its time, and one that raises."""
    outcomes = {}
    has_ended = threading.Event()
    with open_topology(Layout(tp=2)) as topology:
        rollouts = make_rollouts(topology.dp_rank)

        def hangs(requests) -> list[float]:
            has_ended.wait(600)
            return [1.0] * len(requests)

        def hangs_on_one(requests) -> list[float]:
            return hangs(requests) if topology.dp_rank == 1 else [1.0] * len(requests)

        def raises_on_one(requests) -> list[float]:
            return [1.0 / (1 - topology.dp_rank)] * len(requests)

        def dispatcher(function, *, timeout_s: float, concurrency: int = 1) -> RewardDispatcher:
            return RewardDispatcher(
                function,
                topology=topology,
                tokenizer=None,
                skip_failures=True,
                concurrency=concurrency,
                function_timeout_s=timeout_s,
            )

        with handle_preemption_signals():
            if topology.rank == 3:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            outcomes["signal"] = outcome_of(dispatcher(hangs, timeout_s=600), rollouts)
        outcomes["late"] = outcome_of(dispatcher(hangs_on_one, timeout_s=0.3), rollouts)
        for concurrency in (0, 1):
            raising = dispatcher(raises_on_one, timeout_s=600, concurrency=concurrency)
            outcomes[f"raises {concurrency}"] = outcome_of(raising, rollouts)
            outcomes[f"raises again {concurrency}"] = outcome_of(raising, rollouts)
    has_ended.set()
    return outcomes


def test_all_ranks_leave_a_wait_together_and_the_main_rank_shows_a_traceback_once(ranks):
    results = ranks.run(waits_on_ranks)
    for rank, outcomes in enumerate(results):
        assert outcomes["signal"] == ("Preempted: ", "")
        late, _ = outcomes["late"]
        assert late.startswith(
            "RewardError: the reward function waits_on_ranks.<locals>.hangs_on_one did not"
        )
        assert "within 0.3 s" in late
        for concurrency in (0, 1):
            found, said = outcomes[f"raises {concurrency}"]
            assert ("ZeroDivisionError" in found) == (rank in (2, 3))
            assert ("in raises_on_one" in said) == (rank == 0)
            assert ("3 answers are excluded" in said) == (rank == 0)
            assert "in raises_on_one" not in outcomes[f"raises again {concurrency}"][1]


def test_with_concurrency_0_a_function_of_this_process_is_called_once_on_the_main_thread():
    threads, counts = [], []

    def rule(requests) -> list[float]:
        threads.append(threading.current_thread())
        counts.append(len(requests))
        return [1.0] * len(requests)

    with open_topology(Layout()) as topology:
        dispatcher = RewardDispatcher(
            rule, topology=topology, tokenizer=None, skip_failures=False, concurrency=0, function_timeout_s=60
        )
        rollouts = make_rollouts(0)
        dispatcher.submit(0, rollouts.prompts[0], completion(0, is_finished=True))
        assert dispatcher(rollouts, uses_overlapped=True) == [1.0] * 3
    assert (threads, counts) == ([threading.main_thread()], [3])
