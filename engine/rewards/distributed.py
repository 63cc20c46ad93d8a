"""Rewards from a function: one of the ranks that share sequences calls it, all of them get the rewards."""

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
from glm_rlhf.engine.rollout.scheduling.requests import Completion
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology


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
    ) -> None:
        """Start no call yet.

        Args:
            function: the reward function.
            topology: layout and groups.
            tokenizer: decodes the texts of requests; None: ids only.
            skip_failures: whether a failure is logged and returned instead of raised.
            concurrency: most calls at once, in background threads, which score answers as they end; 0: one
                call for all answers, on the caller's thread.
        """
        self.topology, self.tokenizer, self.skip_failures = topology, tokenizer, skip_failures
        self._function = function
        self._calls_function = topology.tp_rank == topology.pp_rank == topology.cp_rank == 0
        self._background = None
        if self._calls_function and concurrency:
            self._background = BackgroundRewards(function, concurrency=concurrency, device=topology.device)

    def submit(self, index: int, prompt: PromptInput, done: Completion) -> None:
        """Queue an answer for scoring during generation; does nothing on other ranks or without threads.

        Args:
            index: of the answer among those of all data-parallel ranks, as later in `Rollouts.indices`.
            prompt: its prompt.
            done: the answer.
        """
        if self._background is not None:
            request = self._request(prompt, done.tokens, is_finished=done.finish_reason == "stop")
            self._background.submit({index: request})

    def discard(self) -> None:
        """Drop all submitted answers."""
        if self._background is not None:
            self._background.discard()

    def __call__(self, rollouts: Rollouts, *, uses_overlapped: bool = False) -> list[Reward | RewardFailure]:
        """Return a reward or, with `skip_failures`, a failure for each answer of this rank.

        Every rank of the topology calls this; the world gathers.

        Args:
            rollouts: the answers.
            uses_overlapped: whether answers submitted since the last `discard` belong to these rollouts;
                otherwise they are discarded and all are scored now.

        Raises:
            RewardError: the function failed on some rank, or for all answers; on all ranks.
        """
        if not uses_overlapped:
            self.discard()
        topology, rewards, failures, error = self.topology, None, [], None
        if self._calls_function:
            requests = [
                self._request(prompt, rollouts.answer(i).tolist(), is_finished=rollouts.is_finished[i])
                for i, prompt in enumerate(rollouts.prompts)
            ]
            rewards = self._rewards(requests, rollouts.indices)
            failures = [
                describe(request, reward)
                for request, reward in zip(requests, rewards, strict=True)
                if isinstance(reward, RewardFailure)
            ]
            if not self.skip_failures:
                try:
                    raise_on_failures(rewards, requests)
                except RewardError as raised:
                    error = str(raised)
        gathered: list = [None] * topology.world_size
        dist.all_gather_object(gathered, (topology.dp_rank, rewards, failures, error))
        parts = [part for part in gathered if part[1] is not None]
        first_error = next((error for *_, error in parts if error is not None), None)
        if first_error is not None:
            raise RewardError(first_error)
        all_failures = [failure for _, _, failures, _ in parts for failure in failures]
        if all_failures and len(all_failures) == sum(len(rewards) for _, rewards, _, _ in parts):
            raise RewardError(
                f"none of {len(all_failures)} answers has a reward, the first {all_failures[0]}"
            )
        if all_failures:
            log(f"{len(all_failures)} answers are excluded, the first reward {all_failures[0]}", topology)
        return next(rewards for rank, rewards, *_ in parts if rank == topology.dp_rank)

    def _rewards(
        self, requests: list[RewardRequest], indices: tuple[int, ...]
    ) -> list[Reward | RewardFailure]:
        if self._background is None:
            return call_reward_function(self._function, requests, skip_failures=True)
        self._background.submit(dict(zip(indices, requests, strict=True)))
        return self._background.take(indices)

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
