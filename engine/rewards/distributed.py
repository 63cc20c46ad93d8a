"""A reward function's word on answers: asked by one rank of those that share them, told to all."""

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
        """Take the function.

        Args:
            function: judges answers.
            topology: layout and groups.
            tokenizer: gives it texts; None for ids alone.
            skip_failures: whether a fault is told on stderr and left to the caller, not an error.
            concurrency: most calls at once, in background threads, where answers are judged as they end; 0
                calls once for all of them, on the caller's thread.
        """
        self.topology, self.tokenizer, self.skip_failures = topology, tokenizer, skip_failures
        self._function = function
        self._asks = topology.tp_rank == topology.pp_rank == topology.cp_rank == 0
        self._background = None
        if self._asks and concurrency:
            self._background = BackgroundRewards(function, concurrency=concurrency, device=topology.device)

    def ask_ahead(self, index: int, prompt: PromptInput, done: Completion) -> None:
        """Have an answer judged while others are generated, where this rank asks and may.

        Args:
            index: its place among those of all data-parallel ranks, as `Rollouts.indices` will have it.
            prompt: what it answers.
            done: the answer.
        """
        if self._background is not None:
            request = self._request(prompt, done.tokens, is_finished=done.finish_reason == "stop")
            self._background.ask({index: request})

    def discard(self) -> None:
        """Drop what was asked early."""
        if self._background is not None:
            self._background.discard()

    def __call__(self, rollouts: Rollouts, *, uses_overlapped: bool = False) -> list[Reward | RewardFailure]:
        """Return a reward or, with `skip_failures`, a fault for each answer of this rank.

        Every rank of the topology calls this.

        Args:
            rollouts: the answers.
            uses_overlapped: whether they are those that `ask_ahead` was given since the last `discard`;
                the others are asked for now.

        Raises:
            RewardError: the function failed on some rank, or for all answers; on every rank.
        """
        if not uses_overlapped:
            self.discard()
        topology, found, faults, error = self.topology, None, [], None
        if self._asks:
            requests = [
                self._request(prompt, rollouts.answer(i).tolist(), is_finished=rollouts.is_finished[i])
                for i, prompt in enumerate(rollouts.prompts)
            ]
            found = self._rewards(requests, rollouts.indices)
            pairs = zip(requests, found, strict=True)
            faults = [describe(one, fault) for one, fault in pairs if isinstance(fault, RewardFailure)]
            if not self.skip_failures:
                try:
                    raise_on_failures(found, requests)
                except RewardError as raised:
                    error = str(raised)
        everyone: list = [None] * topology.world_size
        dist.all_gather_object(everyone, (topology.dp_rank, found, faults, error))
        answered = [part for part in everyone if part[1] is not None]
        raised = next((error for *_, error in answered if error is not None), None)
        if raised is not None:
            raise RewardError(raised)
        all_faults = [words for _, _, faults, _ in answered for words in faults]
        if all_faults and len(all_faults) == sum(len(rewards) for _, rewards, _, _ in answered):
            raise RewardError(f"no answer of {len(all_faults)} has a reward, the first {all_faults[0]}")
        if all_faults:
            log(f"{len(all_faults)} answers are left out, the first reward {all_faults[0]}", topology)
        return next(rewards for rank, rewards, *_ in answered if rank == topology.dp_rank)

    def _rewards(
        self, requests: list[RewardRequest], indices: tuple[int, ...]
    ) -> list[Reward | RewardFailure]:
        if self._background is None:
            return call_reward_function(self._function, requests, skip_failures=True)
        self._background.ask(dict(zip(indices, requests, strict=True)))
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
