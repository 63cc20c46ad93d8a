"""The plan of one generation step, made by the scheduler and executed by every stage."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceWork:
    """The work of one sequence in one step."""

    sequence: int
    """Id of one sample of one request, unique in the queue."""
    tokens: tuple[int, ...]
    """Token ids fed in this step, at least one: a chunk of those that are not yet in the cache."""
    start: int
    """Position of the first of them: the number of positions already in the cache."""
    pages: tuple[int, ...]
    """The page table: position p lies in pages[p // page_size] at offset p % page_size. Its length is
    ceil((start + len(tokens)) / page_size)."""
    samples: bool
    """Whether the token after the last one fed is sampled."""
    seed: int
    """Seed of the sequence's random stream, in the range of int64."""
    num_generated: int
    """Tokens sampled so far: the step of the random stream, which preemption does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of one group: first all copies, then all tokens.

    The copies of all groups' steps must be made in the order in which `GenerationQueue.next` returned them.
    Otherwise steps in flight are independent: each reads pages written by completed steps, copied pages, and
    pages that it writes itself.
    """

    copies: tuple[tuple[int, int], ...]
    """(source page, target page). No page is a target twice, and none is both source and target, so the
    copies may run in any order. A source may be written later in the same step."""
    decodes: tuple[SequenceWork, ...]
    """Sequences that feed one token and sample the next. The token fed is the one sampled last, or the last
    of a prompt whose other tokens are in the cache."""
    prefills: tuple[SequenceWork, ...]
    """All others: chunks of tokens; those that reach the end of their sequence sample."""

    @property
    def num_tokens(self) -> int:
        """Tokens fed in this step."""
        return len(self.decodes) + sum(len(work.tokens) for work in self.prefills)
