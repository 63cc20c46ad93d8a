"""The types that the phases of PPO exchange: packed sequences with their rewards, logprobs and values.

A per-token tensor is one packed stream `[T]` of whole sequences, without padding. `logprobs_T[t]` is
log p(token t | tokens before t), and `values_T[t]` the critic's value of the state in which token t is
chosen: both belong to token t, and are 0 at each sequence's first token. A rank holds the sequences of
its data-parallel rank, the same on all tensor-, pipeline- and context-parallel ranks of it.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInput:
    """A prompt to answer."""

    tokens: tuple[int, ...]
    """Token ids, at least one."""
    extra: Mapping[str, object]
    """Other fields of the record, by name; passed to the reward function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Generated answers, not scored yet."""

    tokens_T: torch.Tensor
    """Token ids, int64 [T]: each sequence is its prompt, then its answer."""
    lengths: tuple[int, ...]
    """Number of tokens of each sequence: B numbers that sum to T."""
    prompt_lengths: tuple[int, ...]
    """Number of prompt tokens of each sequence."""
    prompts: tuple[PromptInput, ...]
    """The prompt of each sequence; samples of one prompt share one object."""
    is_finished: tuple[bool, ...]
    """Whether the answer ended with a stop token or text; false where it was cut at its maximum length."""
    logprobs_T: torch.Tensor
    """Logprobs of the untempered model (temperature 1) that the sampler recorded, fp32 [T]; 0 for prompts."""
    temperature: float
    """Sampling temperature."""
    indices: tuple[int, ...]
    """Index of each sequence among those of all data-parallel ranks; the same in every layout."""
    num_global: int
    """Number of sequences on all data-parallel ranks together."""
    excluded: frozenset[int] = frozenset()
    """Sequences of this rank, by local number from 0, that are not trained on because they have no reward."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def starts(self) -> list[int]:
        """Offset of each sequence's first token, then T: B + 1 numbers."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return starts

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """`starts` as int32 [B + 1], on the device of the tokens."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.tokens_T.device)

    @property
    def action_mask_T(self) -> torch.Tensor:
        """bool [T], true for tokens that the policy chose: those of answers that are not excluded."""
        mask_T = torch.zeros_like(self.tokens_T, dtype=torch.bool)
        starts = self.starts
        for index, (length, prompt_length) in enumerate(zip(self.lengths, self.prompt_lengths, strict=True)):
            if index not in self.excluded:
                mask_T[starts[index] + prompt_length : starts[index] + length] = True
        return mask_T

    def answer(self, index: int) -> torch.Tensor:
        """Return the ids of the answer of sequence `index`, a view."""
        start = self.starts[index]
        return self.tokens_T[start + self.prompt_lengths[index] : start + self.lengths[index]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Rewards of this rank's sequences."""

    rewards_B: torch.Tensor
    """Reward of each answer as a whole, minus its baseline, fp32 [B]; 0 where it is excluded."""
    token_rewards_T: torch.Tensor | None
    """Rewards of single answer tokens, fp32 [T]; None without per-token rewards."""
    excluded: frozenset[int]
    """Sequences, by local number from 0, without a reward or baseline."""

    def totals_B(self, starts: list[int]) -> torch.Tensor:
        """Return `rewards_B` plus the sum of each answer's token rewards, fp32 [B].

        Args:
            starts: `Rollouts.starts`.
        """
        if self.token_rewards_T is None:
            return self.rewards_B
        parts = [self.token_rewards_T[a:b].sum() for a, b in itertools.pairwise(starts)]
        return self.rewards_B + torch.stack(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What scored this rank's answers. None: the algorithm does not need it."""

    rewards: Rewards
    """Rewards less their baselines."""
    old_logprobs_T: torch.Tensor
    """Logprobs of the policy before the update, at the rollouts' temperature, fp32 [T]."""
    ref_logprobs_T: torch.Tensor | None
    """Logprobs of the reference, at the same temperature, fp32 [T]."""
    values_T: torch.Tensor | None
    """The critic's values before the update, fp32 [T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What an algorithm makes of its signals."""

    advantages_T: torch.Tensor
    """Advantages, fp32 [T]; 0 at tokens that are not trained on."""
    returns_T: torch.Tensor | None
    """Targets of the critic, fp32 [T]; None without one."""
    kl_T: torch.Tensor | None
    """Estimated KL to the reference, in nats, fp32 [T]; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """Rollouts with everything that an update needs. None: the algorithm has none."""

    rollouts: Rollouts
    """The sequences."""
    rewards_B: torch.Tensor
    """Reward of each sequence with its token rewards, minus its baseline, fp32 [B]; 0 where excluded."""
    old_logprobs_T: torch.Tensor
    """Logprobs of the policy before the update, at the rollouts' temperature, fp32 [T]."""
    ref_logprobs_T: torch.Tensor | None
    """Logprobs of the reference, at the same temperature, fp32 [T]."""
    values_T: torch.Tensor | None
    """The critic's values before the update, fp32 [T]."""
    advantages_T: torch.Tensor
    """Advantages, fp32 [T]; whitened if ppo.whiten is set."""
    returns_T: torch.Tensor | None
    """Targets of the critic, fp32 [T]."""
    kl_T: torch.Tensor | None
    """Estimated KL to the reference, in nats, fp32 [T]."""
    metrics: Mapping[str, float]
    """Means over all data-parallel ranks: rewards, KL, lengths, difference of the sampler's logprobs."""
