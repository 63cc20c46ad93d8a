"""The state of prompts and their samples in the queue."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from glm_rlhf.engine.rollout.scheduling.requests import GenerationRequest, sample_seed

__all__ = ["PromptState", "SequenceState", "states_of"]


@dataclass(slots=True, eq=False)
class PromptState:
    """A request in the queue: the state that its samples share."""

    request: GenerationRequest
    num_full_pages: int
    """Number of pages before the one that holds the last prompt token; samples share them."""
    copies_page: bool
    """Whether the page of the last prompt token holds other prompt tokens: siblings get a copy of it."""
    num_unfinished: int
    """Samples that have not ended."""
    running: list["SequenceState"] = field(default_factory=list)
    """Samples that own pages, in the order in which they got them."""
    prefiller: "SequenceState | None" = None
    """The sample that computes the prompt now."""
    blocked: list["SequenceState"] = field(default_factory=list)
    """Samples that could start but wait for the prefiller; all other waiting ones are in the scheduler."""
    held_pages: tuple[int, ...] = ()
    """Prompt pages of a finished sample, held for the next sample to start."""

    @property
    def num_waiting(self) -> int:
        """Samples that have not started or were preempted."""
        return self.num_unfinished - len(self.running)

    @property
    def num_reused(self) -> int:
        """Number of positions that siblings reuse: the prompt without its last token."""
        return len(self.request.prompt) - 1

    @property
    def num_prompt_pages(self) -> int:
        """Number of pages that hold a reused position."""
        return self.num_full_pages + self.copies_page

    @property
    def source(self) -> "SequenceState | None":
        """The sample whose positions siblings reuse, None if none runs; not used while one prefills.

        As the first running sample it did not start in the same step, so its pages are not targets of copies.
        """
        return self.running[0] if self.running else None


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sample of one prompt."""

    identity: int
    prompt: PromptState
    sample: int
    seed: int
    rank: tuple[int, int]
    """Order of waiting sequences, smallest first: (1, position in the queue); if preempted, (0, started)."""
    started: int = -1
    """Number of sequences that started before it; kept when preempted."""
    group: int | None = None
    """Group that it runs in; None while it waits."""
    num_cached: int = 0
    """Positions in the cache, without those of a step in flight."""
    pages: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    """Sampled so far."""
    logprobs: list[float] = field(default_factory=list)
    untempered_logprobs: list[float] = field(default_factory=list)

    @property
    def num_unfed(self) -> int:
        """Number of prompt and sampled tokens that are not in the cache; at least one."""
        return len(self.prompt.request.prompt) + len(self.tokens) - self.num_cached

    def unfed_tokens(self, count: int) -> tuple[int, ...]:
        """Return the first `count` tokens that are not in the cache."""
        prompt = self.prompt.request.prompt
        if self.num_cached >= len(prompt):
            begin = self.num_cached - len(prompt)
            return tuple(self.tokens[begin : begin + count])
        return (*prompt, *self.tokens)[self.num_cached : self.num_cached + count]


def states_of(requests: Sequence[GenerationRequest], page_size: int) -> list[SequenceState]:
    """Return all sequences of `requests`, ordered by new tokens, prompt length, caller's order and sample.

    Identities follow the caller's order.
    """
    sequences = []
    for request in requests:
        num_full_pages, rest = divmod(len(request.prompt) - 1, page_size)
        prompt = PromptState(
            request, num_full_pages, copies_page=rest > 0, num_unfinished=request.num_samples
        )
        for sample in range(request.num_samples):
            seed = sample_seed(request.seed, sample)
            sequences.append(SequenceState(len(sequences), prompt, sample, seed, rank=(1, len(sequences))))

    def longest_first(sequence: SequenceState) -> tuple[int, int, int]:
        request = sequence.prompt.request
        return -request.max_new_tokens, -len(request.prompt), sequence.identity

    sequences.sort(key=longest_first)
    for position, sequence in enumerate(sequences):
        sequence.rank = (1, position)
    return sequences
