"""Who computes what in one step of generation: what the scheduler decides and a stage carries out."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceWork:
    """What one sequence does in one step."""

    sequence: int
    """Unique over the queue: stands for one sample of one request."""
    tokens: tuple[int, ...]
    """Token ids fed now, at least one: a chunk of what is not in the cache yet."""
    start: int
    """Position of the first of them: so many positions are in the cache before."""
    pages: tuple[int, ...]
    """The page table: position p lies in pages[p // page_size] at offset p % page_size. Its length is
    ceil((start + len(tokens)) / page_size)."""
    samples: bool
    """Whether the token after the last one fed is to be drawn."""
    seed: int
    """Of the sequence's random stream, in the range of int64."""
    num_generated: int
    """Tokens drawn so far: the step of the random stream, which preemption does not move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of one group: first all copies, then all tokens.

    The copies of all groups' steps must be made in the order in which `GenerationQueue.next` gave them. Apart
    from that, steps that are in flight together do not depend on one another: each reads what was computed
    in steps already taken, what was copied, and what it writes itself.
    """

    copies: tuple[tuple[int, int], ...]
    """(source page, target page). No page is a target twice, and none is both source and target, so the
    copies may run in any order. A source may be written later in the same step."""
    decodes: tuple[SequenceWork, ...]
    """Those that feed one token and draw the next. The token is the one drawn last, or the last of a prompt
    whose rest is in the cache."""
    prefills: tuple[SequenceWork, ...]
    """All others: chunks, of which those that reach the end of their sequence sample."""

    @property
    def num_tokens(self) -> int:
        """Tokens fed in this step."""
        return len(self.decodes) + sum(len(work.tokens) for work in self.prefills)
