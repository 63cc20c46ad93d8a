"""The reward of PPO: a reward model, a function, or both, less that of a reference answer."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from glm_rlhf.engine.data.chat_tokenizer import Tokenizer
from glm_rlhf.engine.rollout.rewards import RewardError, RewardFunction, RewardRequest, judge
from glm_rlhf.engine.stages.stream_batches import stream_batches
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.scoring import score_rows
from glm_rlhf.parallel.topology import Topology

AnswerByReference = Callable[[Sequence[PromptInput]], Rollouts]
"""Answers of the reference to this rank's prompts, one each; ranks that share them call together."""


class RewardTerms:
    """Owns what rewards need: the reward model's chunks, and what reference answers have scored."""

    def __init__(
        self,
        *,
        topology: Topology,
        micro_batch_tokens: int,
        tokenizer: Tokenizer | None = None,
        model: Sequence[GLMModel] | None = None,
        function: RewardFunction | None = None,
        function_weight: float = 1.0,
        answer_by_reference: AnswerByReference | None = None,
    ) -> None:
        """Combine the terms.

        Args:
            topology: layout and groups.
            micro_batch_tokens: budget of a micro-batch of the reward model.
            tokenizer: gives the function its texts.
            model: this rank's chunks of a reward model; None for none.
            function: judges answers; None for none.
            function_weight: factor of the function's reward.
            answer_by_reference: where given, the reward of its answer to the same prompt is subtracted
                (ChatGLM-RLHF's baseline); each prompt is answered once and its score kept.

        Raises:
            ValueError: neither a model nor a function.
        """
        if model is None and function is None:
            raise ValueError("a reward needs a reward model or a function")
        self.topology, self.micro_batch_tokens = topology, micro_batch_tokens
        self.tokenizer, self.model = tokenizer, model
        self.function, self.function_weight = function, function_weight
        self.answer_by_reference = answer_by_reference
        self.baselines: dict[tuple[int, ...], float] = {}

    def __call__(self, rollouts: Rollouts) -> torch.Tensor:
        """Return rewards less baselines, fp32 [B]; every rank of the topology calls this.

        Raises:
            RewardError: the function failed on some rank; on all of them.
        """
        rewards_B = self._total(rollouts)
        if self.answer_by_reference is None:
            return rewards_B
        self._learn_baselines(rollouts.prompts)
        baselines = [self.baselines[prompt.tokens] for prompt in rollouts.prompts]
        return rewards_B - torch.tensor(baselines, device=rewards_B.device)

    def _learn_baselines(self, prompts: Sequence[PromptInput]) -> None:
        unknown = {p.tokens: p for p in prompts if p.tokens not in self.baselines}
        # The reference's ranks generate together: all take part while any of them has a new prompt.
        num_unknown = torch.tensor([len(unknown)], device=self.topology.device)
        dist.all_reduce(num_unknown)
        if not int(num_unknown):
            return
        new = tuple(unknown.values()) or prompts[:1]
        answers = self.answer_by_reference(new)
        scores = self._total(answers).tolist()
        for prompt, score in zip(answers.prompts, scores, strict=True):
            self.baselines.setdefault(prompt.tokens, score)

    def _total(self, rollouts: Rollouts) -> torch.Tensor:
        total_B = torch.zeros(rollouts.num_sequences, device=rollouts.tokens_T.device)
        if self.model is not None:
            total_B += self._model_scores(rollouts)
        if self.function is not None:
            judged = self._judge_together(rollouts)
            total_B += self.function_weight * torch.tensor(judged, device=total_B.device)
        return total_B

    def _model_scores(self, rollouts: Rollouts) -> torch.Tensor:
        """Return the reward model's scalar at each sequence's last token."""
        batches = stream_batches(
            rollouts.tokens_T,
            rollouts.lengths,
            max_tokens=self.micro_batch_tokens,
            multiple=self.topology.layout.token_multiple,
        )
        rows_T = torch.zeros(rollouts.tokens_T.shape, device=rollouts.tokens_T.device)
        found = score_rows(self.model, [batch.packed for batch in batches], topology=self.topology)
        for batch, rows in zip(batches, found, strict=True):
            batch.put(rows, rows_T)
        return rows_T[rollouts.cu_seqlens[1:].long() - 1]

    def _judge_together(self, rollouts: Rollouts) -> list[float]:
        """Let one rank of those that share the sequences ask the function, and tell the others."""
        place = self.topology
        answer: list = [None, None]
        if place.tp_rank == place.pp_rank == place.cp_rank == 0:
            try:
                answer[0] = judge(self.function, self._requests(rollouts))
            except RewardError as error:
                answer[1] = str(error)
        everyone: list = [None] * place.world_size
        dist.all_gather_object(everyone, (place.dp_rank, *answer))
        fault = next((error for _, _, error in everyone if error is not None), None)
        if fault is not None:
            raise RewardError(fault)
        return next(rewards for rank, rewards, _ in everyone if rank == place.dp_rank and rewards is not None)

    def _requests(self, rollouts: Rollouts) -> list[RewardRequest]:
        requests = []
        for index, prompt in enumerate(rollouts.prompts):
            response = rollouts.answer(index).tolist()
            requests.append(
                RewardRequest(
                    prompt_tokens=prompt.tokens,
                    response_tokens=tuple(response),
                    prompt=self.tokenizer and self.tokenizer.decode(prompt.tokens, unknown="replace"),
                    response=self.tokenizer and self.tokenizer.decode_response(response, unknown="replace"),
                    is_finished=rollouts.is_finished[index],
                    extra=prompt.extra,
                )
            )
        return requests
