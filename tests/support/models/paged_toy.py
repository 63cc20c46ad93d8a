"""A model without weights, each token of which depends on everything read through the page tables."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from glm_rlhf.engine.rollout.scheduling.request_queue import (
    Completion,
    GenerationQueue,
    GenerationRequest,
    StepPlan,
    sample_seed,
)
from glm_rlhf.parallel.inference.step_plan import SequenceWork

VOCABULARY = 40


def next_token(entries: Sequence[tuple[int, int] | None], seed: int, step: int) -> int:
    """Return the token after `entries`: (position, token) as read at each position, None if never written."""
    # Python hashes integers and tuples of them the same in every process.
    return hash((*((-1, -1) if entry is None else entry for entry in entries), seed, step)) % VOCABULARY


def draw_logprobs(token: int, seed: int, step: int) -> tuple[float, float]:
    """Return two numbers in place of the logprobs of a sample."""
    return -float(hash((token, seed, step)) % 97), -float(hash((seed, token, step)) % 89)


def answer_alone(
    request: GenerationRequest, sample: int, stop_check: Callable[[Sequence[int]], bool] | None = None
) -> Completion:
    """Return the answer of a sample that runs alone and without paging."""
    seed, tokens, logprobs = sample_seed(request.seed, sample), [], []
    reason = None
    while reason is None:
        prefix = list(enumerate((*request.prompt, *tokens)))
        step = len(tokens)
        tokens.append(next_token(prefix, seed, step))
        logprobs.append(draw_logprobs(tokens[-1], seed, step))
        if tokens[-1] in request.stop_ids or (stop_check is not None and stop_check(tokens)):
            reason = "stop"
        elif len(tokens) == request.max_new_tokens:
            reason = "length"
    return Completion(
        request=request.index,
        sample=sample,
        tokens=tuple(tokens),
        logprobs=tuple(pair[0] for pair in logprobs),
        untempered_logprobs=tuple(pair[1] for pair in logprobs),
        finish_reason=reason,
    )


@dataclass
class PagedMemory:
    """The cache: the last entry written to each (page, offset)."""

    page_size: int
    slots: dict[tuple[int, int], tuple[int, int] | None] = field(default_factory=dict)

    def copy(self, step: StepPlan) -> None:
        for source, target in step.copies:
            for offset in range(self.page_size):
                self.slots[target, offset] = self.slots.get((source, offset))

    def feed(self, step: StepPlan) -> None:
        for work in (*step.decodes, *step.prefills):
            for position, token in enumerate(work.tokens, work.start):
                self.slots[self._slot(work, position)] = (position, token)

    def draw(self, step: StepPlan) -> tuple[list[int], list[float], list[float]]:
        """Return token, logprob and untempered logprob of each sampling sequence, in queue order."""
        samples = []
        for work in (*step.decodes, *step.prefills):
            if work.samples:
                length = work.start + len(work.tokens)
                entries = [self.slots.get(self._slot(work, position)) for position in range(length)]
                token = next_token(entries, work.seed, work.num_generated)
                samples.append((token, *draw_logprobs(token, work.seed, work.num_generated)))
        return tuple([row[i] for row in samples] for i in range(3))

    def _slot(self, work: SequenceWork, position: int) -> tuple[int, int]:
        return work.pages[position // self.page_size], position % self.page_size


@dataclass
class Simulation:
    """Runs a queue in the canonical order and checks each step."""

    queue: GenerationQueue
    page_size: int
    max_batch: int
    max_step_tokens: int
    num_groups: int = 1
    order: Random = field(default_factory=lambda: Random(0))
    """Decides when a step is computed: at any time between its copies and `take`."""
    steps: list[tuple[int, StepPlan]] = field(default_factory=list)
    """(group, step) in the order in which they were given."""

    def __post_init__(self) -> None:
        self.memory = PagedMemory(self.page_size)
        self.in_flight: list[StepPlan | None] = [None] * self.num_groups
        self.not_computed: set[int] = set()  # groups

    def rounds(self) -> Iterator[list[Completion]]:
        """Yield the completions of each round of all groups, until the queue is finished."""
        while not self.queue.is_finished:
            completions, has_moved = [], any(self.in_flight)
            for group in range(self.num_groups):
                step = self.in_flight[group]
                if step is not None:
                    self._compute(group)
                    completions += self.queue.take(group, *self.memory.draw(step))
                step = self.in_flight[group] = self.queue.next(group)
                if step is not None:
                    has_moved = True
                    self.steps.append((group, step))
                    self._check(group, step)
                    self.memory.copy(step)
                    self.not_computed.add(group)
                for other in sorted(self.not_computed):
                    if self.order.random() < 0.3:
                        self._compute(other)
            assert has_moved, "no group has anything to do, yet work is left"
            yield completions

    def run(self) -> list[Completion]:
        return [completion for completions in self.rounds() for completion in completions]

    def _compute(self, group: int) -> None:
        if group in self.not_computed:
            self.not_computed.remove(group)
            self.memory.feed(self.in_flight[group])

    def _check(self, group: int, step: StepPlan) -> None:
        works = (*step.decodes, *step.prefills)
        assert works, "a step without work"
        assert step.num_tokens == sum(len(work.tokens) for work in works) <= self.max_step_tokens
        assert self.queue.num_running <= self.max_batch
        assert len(works) <= -(-self.max_batch // self.num_groups), "more than the group's share"
        assert all(len(work.tokens) == 1 and work.samples for work in step.decodes)
        for work in works:
            assert work.tokens
            assert len(work.pages) == -(-(work.start + len(work.tokens)) // self.page_size)
        running = [
            work.sequence
            for flying in self.in_flight
            if flying
            for work in (*flying.decodes, *flying.prefills)
        ]
        assert len(running) == len(set(running)), "a sequence in two places at once"
        for members in self.queue._scheduler._groups:
            started = [member.started for member in members]
            assert started == sorted(started), "the last of a group is not the one to be preempted first"
        self._check_pages(group, step)

    def _check_pages(self, group: int, step: StepPlan) -> None:
        pool = self.queue.pool
        written = self._written(step)
        assert len(written) == len(set(written)), "two sequences write the same page"
        assert all(pool.num_owners(page) == 1 for page in written), "a page is written while shared or free"
        sources, targets = {source for source, _ in step.copies}, [target for _, target in step.copies]
        assert len(targets) == len(set(targets))
        assert sources.isdisjoint(targets), "the copies depend on their order"
        assert set(targets) <= set(written), "a copy that nobody writes to"
        for other, flying in enumerate(self.in_flight):
            if other == group or flying is None:
                continue
            used = {page for work in (*flying.decodes, *flying.prefills) for page in work.pages}
            assert all(pool.num_owners(page) > 0 for page in used), "a page in flight was taken away"
            assert used.isdisjoint(written), "a page in flight is written by another group"
            assert used.isdisjoint(targets)

    def _written(self, step: StepPlan) -> list[int]:
        pages = []
        for work in (*step.decodes, *step.prefills):
            pages += work.pages[work.start // self.page_size :]
        return pages
