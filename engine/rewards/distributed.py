"""Rewards from a function: one of the ranks that share sequences calls it, all of them get the rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.rewards.background import BackgroundRewards
from glm_rlhf.engine.rewards.function import (
    Reward,
    RewardError,
    RewardFailure,
    RewardFunction,
    RewardRequest,
    call_reward_function,
    describe,
    raise_on_failures,
)
from glm_rlhf.engine.rewards.http import HttpReward
from glm_rlhf.engine.rewards.in_process import InProcessReward
from glm_rlhf.engine.rewards.in_worker import WorkerReward
from glm_rlhf.engine.rewards.weighted_sum import RewardSum, in_process_parts
from glm_rlhf.engine.rollout.scheduling.requests import Completion
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.preemption import Preempted, preemption_requested
from glm_rlhf.parallel.runtime.spans import heartbeat
from glm_rlhf.parallel.runtime.topology import Topology

_POLL_S = 0.25  # between two questions to all ranks, while some of them wait for rewards
_DONE, _WAITING, _OVERDUE = range(3)


class RewardDispatcher:
    """Owns the calls of a reward function on behalf of the ranks that share sequences."""

    def __init__(
        self,
        function: RewardFunction,
        *,
        topology: Topology,
        tokenizer: Tokenizer | None,
        skip_failures: bool,
        concurrency: int,
        function_timeout_s: float,
    ) -> None:
        """Start no call yet.

        Args:
            function: the reward function.
            topology: layout and groups.
            tokenizer: decodes the texts of requests; None: ids only.
            skip_failures: whether a failure is logged and returned instead of raised.
            concurrency: most calls at once, in background threads, which score answers as they end; 0: one
                call for all answers after generation, on the caller's thread if this process calls the
                function.
            function_timeout_s: longest time of a call of a Python function in seconds; one that takes longer
                ends the run.
        """
        self.topology, self.tokenizer, self.skip_failures = topology, tokenizer, skip_failures
        if not isinstance(function, (RewardSum, HttpReward, WorkerReward, InProcessReward)):
            name = getattr(function, "__qualname__", type(function).__name__)
            function = InProcessReward(function, name=name, timeout_s=function_timeout_s)
        self._function, self._in_process = function, in_process_parts(function)
        self._calls_function = calls_reward_function(topology)
        self._overlaps_scoring = concurrency > 0
        self._background = None
        if self._calls_function and (concurrency or not self._in_process):
            self._background = BackgroundRewards(
                function, concurrency=max(concurrency, 1), device=topology.device
            )
        self._shown_tracebacks: set[str] = set()

    def submit(self, index: int, prompt: PromptInput, done: Completion) -> None:
        """Queue an answer for scoring during generation; does nothing on other ranks or without threads.

        Args:
            index: of the answer among those of all data-parallel ranks, as later in `Rollouts.indices`.
            prompt: its prompt.
            done: the answer.
        """
        if self._background is not None and self._overlaps_scoring:
            request = self._request(prompt, done.tokens, is_finished=done.finish_reason == "stop")
            self._background.submit({index: request})

    def discard(self) -> None:
        """Drop all submitted answers."""
        if self._background is not None:
            self._background.discard()

    def __call__(self, rollouts: Rollouts, *, uses_overlapped: bool = False) -> list[Reward | RewardFailure]:
        """Return a reward or, with `skip_failures`, a failure for each answer of this rank.

        Every rank of the topology calls this; the world waits together, and gathers.

        Args:
            rollouts: the answers.
            uses_overlapped: whether answers submitted since the last `discard` belong to these rollouts;
                otherwise they are discarded and all are scored now.

        Raises:
            RewardError: the function failed on some rank, or for all answers, or a call is past its time and
                cannot be ended; on all ranks.
            Preempted: preemption was requested while rewards were awaited; on all ranks.
        """
        if not uses_overlapped:
            self.discard()
        result = self._call(rollouts)
        topology = self.topology
        gathered: list[_RankResult | None] = [None] * topology.world_size
        dist.all_gather_object(gathered, result)
        parts = [part for part in gathered if part is not None]
        traceback = next((part.traceback for part in parts if part.traceback is not None), None)
        if traceback is not None and traceback not in self._shown_tracebacks:
            self._shown_tracebacks.add(traceback)
            log(traceback.rstrip(), topology)
        first_error = next((part.error for part in parts if part.error is not None), None)
        if first_error is not None:
            raise RewardError(first_error)
        failures = [failure for part in parts for failure in part.failures]
        if failures and len(failures) == sum(len(part.rewards) for part in parts):
            raise RewardError(f"none of {len(failures)} answers has a reward, the first {failures[0]}")
        if failures:
            log(f"{len(failures)} answers are excluded, the first reward {failures[0]}", topology)
        return next(part.rewards for part in parts if part.dp_rank == topology.dp_rank)

    def _call(self, rollouts: Rollouts) -> "_RankResult | None":
        """Return what the function gave for the answers of this rank; None on ranks that do not call it."""
        requests: list[RewardRequest] = []
        rewards: list[Reward | RewardFailure] = []
        if self._calls_function:
            requests = [
                self._request(prompt, rollouts.answer(i).tolist(), is_finished=rollouts.is_finished[i])
                for i, prompt in enumerate(rollouts.prompts)
            ]
            if self._background is not None:
                self._background.submit(dict(zip(rollouts.indices, requests, strict=True)))
            else:
                rewards = call_reward_function(self._function, requests, skip_failures=True)
        state, error = self._wait(rollouts.indices)
        if not self._calls_function:
            return None
        if state == _OVERDUE:
            return _RankResult(dp_rank=self.topology.dp_rank, error=error)
        if self._background is not None:
            rewards = self._background.take(rollouts.indices)
        failed = [
            (request, reward)
            for request, reward in zip(requests, rewards, strict=True)
            if isinstance(reward, RewardFailure)
        ]
        if not self.skip_failures:
            try:
                raise_on_failures(rewards, requests)
            except RewardError as raised:
                error = str(raised)
        return _RankResult(
            dp_rank=self.topology.dp_rank,
            rewards=rewards,
            failures=[describe(request, failure) for request, failure in failed],
            error=error,
            traceback=next((failure.traceback for _, failure in failed if failure.traceback), None),
        )

    def _wait(self, indices: Sequence[int]) -> tuple[int, str | None]:
        """Wait until all ranks have the results of their answers, or one has a call that is past its time.

        Ranks that call no function wait too, and all of them look for a signal at the same moments: a rank
        that left alone would leave the others in a collective.

        Returns:
            `_DONE` or `_OVERDUE`, the same on all ranks, and the sentence about this rank's overdue call.

        Raises:
            Preempted: on all ranks.
        """
        device, error = self.topology.device, None
        while True:
            state = _DONE
            if self._background is not None and not self._background.wait(indices, timeout_s=_POLL_S):
                sentences = [sentence for part in self._in_process if (sentence := part.overdue())]
                error = next(iter(sentences), None)
                state = _WAITING if error is None else _OVERDUE
            states = torch.tensor([state], device=device)
            dist.all_reduce(states, op=dist.ReduceOp.MAX)
            heartbeat()  # a wait is bounded by the timeouts of what is waited for
            state = int(states)
            if state != _WAITING:
                return state, error
            if preemption_requested((None, device)):
                self.discard()
                raise Preempted

    def _request(
        self, prompt: PromptInput, response: tuple[int, ...] | list[int], *, is_finished: bool
    ) -> RewardRequest:
        return RewardRequest(
            prompt_tokens=prompt.tokens,
            response_tokens=tuple(response),
            prompt=self.tokenizer and self.tokenizer.decode(prompt.tokens, unknown="replace"),
            response=self.tokenizer and self.tokenizer.decode_response(response, unknown="replace"),
            is_finished=is_finished,
            extra=prompt.extra,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RankResult:
    """What one rank's calls gave, for all ranks."""

    dp_rank: int
    """Of the rank."""
    rewards: list[Reward | RewardFailure] = field(default_factory=list)
    """Of its answers."""
    failures: list[str] = field(default_factory=list)
    """What `describe` says of each that has none."""
    error: str | None = None
    """What ends the run; None: nothing."""
    traceback: str | None = None
    """Of the first failure that has one."""


def calls_reward_function(topology: Topology) -> bool:
    """Return whether this rank calls the reward function: of those that share sequences, one does."""
    return topology.tp_rank == topology.pp_rank == topology.cp_rank == 0
