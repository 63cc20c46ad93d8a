"""The reward of PPO: a reward model, a reward function, or both, minus the reward of a reference answer."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.rewards.distributed import RewardDispatcher
from glm_rlhf.engine.rewards.function import RewardFailure, RewardFunction
from glm_rlhf.engine.scoring.overlapped_scores import OverlappedScores
from glm_rlhf.engine.scoring.rollout_scores import stream_rows
from glm_rlhf.engine.types import PromptInput, Rewards, Rollouts
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.nonfinite import abbreviate, raise_if_nonfinite
from glm_rlhf.parallel.runtime.topology import Topology

AnswerByReference = Callable[[Sequence[PromptInput]], Rollouts]
"""Returns one answer of the reference to each prompt of this rank; ranks that share prompts call together."""


class CombinedReward:
    """Owns the reward model's chunks, the calls of the reward function, and the baselines of prompts."""

    def __init__(
        self,
        *,
        topology: Topology,
        micro_batch_tokens: int,
        tokenizer: Tokenizer | None = None,
        model: Sequence[GLMModel] | None = None,
        function: RewardFunction | None = None,
        function_weight: float = 1.0,
        skip_failures: bool = False,
        concurrency: int = 1,
        function_timeout_s: float = 300.0,
        answer_by_reference: AnswerByReference | None = None,
    ) -> None:
        """Combine the rewards.

        Args:
            topology: layout and groups.
            micro_batch_tokens: most tokens per micro-batch of the reward model.
            tokenizer: decodes the texts that the function gets.
            model: this rank's chunks of a reward model; None: no reward model.
            function: the reward function; None: no reward function.
            function_weight: weight of the function's reward.
            skip_failures: whether an answer without a reward of the function is excluded and logged, instead
                of ending the run.
            concurrency: most calls of the function at once, as for `RewardDispatcher`.
            function_timeout_s: longest time of a call of a Python function, likewise.
            answer_by_reference: if given, the reward of its answer to the same prompt is subtracted
                (ChatGLM-RLHF's baseline); each prompt is answered once and its reward kept.

        Raises:
            ValueError: neither a reward model nor a function.
        """
        if model is None and function is None:
            raise ValueError("a reward needs a reward model or a function")
        self.topology, self.micro_batch_tokens = topology, micro_batch_tokens
        self.model, self.function_weight = model, function_weight
        self.dispatcher = None
        if function is not None:
            self.dispatcher = RewardDispatcher(
                function,
                topology=topology,
                tokenizer=tokenizer,
                skip_failures=skip_failures,
                concurrency=concurrency,
                function_timeout_s=function_timeout_s,
            )
        self.answer_by_reference = answer_by_reference
        self.baselines: dict[tuple[int, ...], float] = {}

    def __call__(
        self, rollouts: Rollouts, *, uses_overlapped: bool = False, overlapped: OverlappedScores | None = None
    ) -> Rewards:
        """Return rewards minus baselines; every rank of the topology calls this.

        Where failures are skipped, an answer is excluded if it or the reference answer to its prompt has no
        reward; the reference answers the prompt again the next time it comes.

        Args:
            rollouts: the answers.
            uses_overlapped: whether these answers were submitted to the function as they ended, by
                `dispatcher.submit`.
            overlapped: scores of the reward model computed during generation, for some answers.

        Raises:
            RewardError: the function failed on some rank, or for all answers; on all ranks.
            Preempted: preemption was requested while its rewards were awaited; on all ranks.
        """
        rewards = self.without_baseline(rollouts, uses_overlapped=uses_overlapped, overlapped=overlapped)
        if self.answer_by_reference is None:
            return rewards
        self._learn_baselines(rollouts.prompts)
        baselines = [self.baselines.get(prompt.tokens) for prompt in rollouts.prompts]
        excluded = rewards.excluded | {i for i, baseline in enumerate(baselines) if baseline is None}
        minus_baseline_B = rewards.rewards_B - torch.tensor(
            [baseline or 0.0 for baseline in baselines], device=rewards.rewards_B.device
        )
        minus_baseline_B[sorted(excluded)] = 0.0
        return Rewards(rewards_B=minus_baseline_B, token_rewards_T=rewards.token_rewards_T, excluded=excluded)

    def baseline_tensors(self) -> dict[str, torch.Tensor]:
        """Return the baselines of all prompts so far, as tensors that a checkpoint can hold."""
        prompts = list(self.baselines)
        return {
            "baseline_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
            "baseline_tokens": torch.tensor([t for prompt in prompts for t in prompt], dtype=torch.int64),
            "baseline_scores": torch.tensor([self.baselines[p] for p in prompts], dtype=torch.float64),
        }

    def add_baselines(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add the baselines that `baseline_tensors` returned, for prompts that have none yet."""
        lengths = tensors["baseline_lengths"].tolist()
        scores = tensors["baseline_scores"].tolist()
        for tokens, score in zip(tensors["baseline_tokens"].split(lengths), scores, strict=True):
            self.baselines.setdefault(tuple(tokens.tolist()), score)

    def _learn_baselines(self, prompts: Sequence[PromptInput]) -> None:
        unknown = {p.tokens: p for p in prompts if p.tokens not in self.baselines}
        # The reference's ranks generate together: all take part as long as one of them has a new prompt.
        num_unknown = torch.tensor([len(unknown)], device=self.topology.device)
        dist.all_reduce(num_unknown)
        if not int(num_unknown):
            return
        new = tuple(unknown.values()) or prompts[:1]
        answers = self.answer_by_reference(new)
        rewards = self.without_baseline(answers)
        scores = rewards.totals_B(answers.starts).tolist()
        for index, (prompt, score) in enumerate(zip(answers.prompts, scores, strict=True)):
            if index not in rewards.excluded:
                self.baselines.setdefault(prompt.tokens, score)

    def without_baseline(
        self, rollouts: Rollouts, *, uses_overlapped: bool = False, overlapped: OverlappedScores | None = None
    ) -> Rewards:
        """Return rewards with nothing subtracted; every rank of the topology calls this.

        Raises:
            RewardError: the function failed on some rank, or for all answers; on all ranks.
            FloatingPointError: a reward is NaN or Inf; on all ranks, with the model and the answers.
            Preempted: preemption was requested while its rewards were awaited; on all ranks.
        """
        findings: list[str] = []
        device = rollouts.tokens_T.device
        total_B, token_T, excluded = torch.zeros(rollouts.num_sequences, device=device), None, set()
        if self.model is not None:
            rows_T = stream_rows(
                self.model,
                rollouts,
                max_tokens=self.micro_batch_tokens,
                topology=self.topology,
                overlapped=overlapped,
            )
            total_B += rows_T[rollouts.cu_seqlens[1:].long() - 1]
            findings += _nonfinite("the reward model's scores", total_B, rollouts)
        if self.dispatcher is not None:
            for index, reward in enumerate(self.dispatcher(rollouts, uses_overlapped=uses_overlapped)):
                if isinstance(reward, RewardFailure):
                    excluded.add(index)
                elif isinstance(reward, tuple):
                    token_T = (
                        torch.zeros(rollouts.tokens_T.shape, device=device) if token_T is None else token_T
                    )
                    end = rollouts.starts[index + 1]
                    weighted = self.function_weight * torch.tensor(reward, device=device)
                    token_T[end - len(reward) : end] = weighted
                else:
                    total_B[index] += self.function_weight * reward
        total_B[sorted(excluded)] = 0.0
        rewards = Rewards(rewards_B=total_B, token_rewards_T=token_T, excluded=frozenset(excluded))
        findings = findings or _nonfinite("the weighted rewards", rewards.totals_B(rollouts.starts), rollouts)
        raise_if_nonfinite(findings, "no reward is taken from them", device=self.topology.device)
        return rewards


def _nonfinite(name: str, values_B: torch.Tensor, rollouts: Rollouts) -> list[str]:
    """Return what a message says of the answers whose value is NaN or Inf; nothing if there are none."""
    is_finite = values_B.isfinite().tolist()
    answers = [index for index, is_ok in zip(rollouts.indices, is_finite, strict=True) if not is_ok]
    return [f"{name} of answers {abbreviate(answers)}"] if answers else []
