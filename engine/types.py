"""What the stages of PPO hand each other: packed sequences, and what is known of their tokens.

Every per-token tensor lies in one stream `[T]` of whole sequences, without padding. `logprobs_T[t]` is
log p(token t | tokens before t), and `values_T[t]` the critic's value of the state in which token t is
chosen: both belong to token t, and are 0 at each sequence's first token. A rank holds the sequences of
its data-parallel share, the same on all ranks that share it.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInput:
    """What is to be answered."""

    tokens: tuple[int, ...]
    """Ids, at least one."""
    extra: Mapping[str, object]
    """Further fields of the record; a rule reward gets them by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Answers, not scored yet."""

    tokens_T: torch.Tensor
    """Ids, int64 [T]: each sequence is its prompt, then its answer."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, B numbers that sum to T."""
    prompt_lengths: tuple[int, ...]
    """Tokens of each sequence's prompt."""
    prompts: tuple[PromptInput, ...]
    """The prompt of each sequence; samples of one prompt share theirs."""
    is_finished: tuple[bool, ...]
    """Whether the answer ended by itself; false where it was cut at its longest."""
    logprobs_T: torch.Tensor
    """Plain logprobs at temperature 1 that the sampler recorded, fp32 [T]; 0 for prompts."""
    temperature: float
    """Temperature that tokens were drawn at."""
    indices: tuple[int, ...]
    """Place of each sequence among those of all data-parallel ranks: the same in every layout."""
    num_global: int
    """Sequences of all data-parallel ranks."""
    excluded: frozenset[int] = frozenset()
    """Sequences of this rank, by number from 0, that nothing is learned from: no reward could be had."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def starts(self) -> list[int]:
        """First token of each sequence, and T: B + 1 numbers."""
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
        """bool [T], true for tokens that the policy chose: the answers that are not left out."""
        mask_T = torch.zeros_like(self.tokens_T, dtype=torch.bool)
        starts = self.starts
        for index, (length, prompt_length) in enumerate(zip(self.lengths, self.prompt_lengths, strict=True)):
            if index not in self.excluded:
                mask_T[starts[index] + prompt_length : starts[index] + length] = True
        return mask_T

    def answer(self, index: int) -> torch.Tensor:
        """Return the answer's ids of sequence `index`, a view."""
        start = self.starts[index]
        return self.tokens_T[start + self.prompt_lengths[index] : start + self.lengths[index]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """What the answers of this rank's sequences are worth."""

    rewards_B: torch.Tensor
    """Of each answer as a whole, less its baseline, fp32 [B]; 0 where it is left out."""
    token_rewards_T: torch.Tensor | None
    """Of single tokens of the answers, fp32 [T]; None where nothing judges tokens."""
    excluded: frozenset[int]
    """Sequences, by number from 0, whose reward or baseline could not be had."""

    def totals_B(self, starts: list[int]) -> torch.Tensor:
        """Return what each answer is worth in all, fp32 [B]; `starts` are those of the rollouts."""
        if self.token_rewards_T is None:
            return self.rewards_B
        parts = [self.token_rewards_T[a:b].sum() for a, b in itertools.pairwise(starts)]
        return self.rewards_B + torch.stack(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """Rollouts with everything that an update needs."""

    rollouts: Rollouts
    """The sequences."""
    rewards_B: torch.Tensor
    """Reward of each sequence, of its tokens together, less its baseline, fp32 [B]; 0 where left out."""
    old_logprobs_T: torch.Tensor
    """The policy's logprobs before the update, of the distribution at the rollouts' temperature, fp32 [T]."""
    ref_logprobs_T: torch.Tensor
    """The reference's, likewise, fp32 [T]."""
    values_T: torch.Tensor
    """The critic's values before the update, fp32 [T]."""
    advantages_T: torch.Tensor
    """Advantages, fp32 [T]; whitened if the config says so."""
    returns_T: torch.Tensor
    """What the critic is to learn, fp32 [T]."""
    kl_T: torch.Tensor
    """Estimated KL to the reference, nats, fp32 [T]."""
    metrics: Mapping[str, float]
    """Means over all data-parallel ranks: rewards, KL, lengths, gap of the rollout's logprobs."""
