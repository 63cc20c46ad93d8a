"""Decides which sequences run, on which pages.

Waiting sequences start in this order: largest max_new_tokens first, then longest prompt, then the caller's
order; samples of a prompt are adjacent. Long sequences first leaves short ones for the end, when the batch
can no longer be filled. Preempted sequences come before all that have not started.

Samples of one prompt: the first one to start prefills the prompt; its siblings are blocked until all but the
prompt's last token is in the cache. A sibling then shares the pages before the one that holds the last prompt
token, gets a copy of that one if it holds anything else, and feeds the last prompt token again. This costs
one token, and makes the sibling's first token the result of a forward of its own row, with its own seed, at
num_generated = 0, like every other token. Nothing is written to a shared page: the pages before the copied
one are full. If a sample finishes while siblings wait and none of them runs, its prompt pages are held for
the next sibling, and released before any sequence is preempted and for sequences that start before it.

Pages: a sequence gets the pages of all its tokens when it starts, later one page at a time. Without a free
page it preempts the most recently started sequence, of the groups without a step in flight, that started
after it. If there is none, it keeps its pages and stalls, and no sequence starts until it runs again. The
earliest started sequence is never preempted and fits alone, so every sequence finishes.
"""

import heapq
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

from glm_rlhf.engine.rollout.scheduling.page_pool import PagePool
from glm_rlhf.engine.rollout.scheduling.requests import GenerationRequest, QueueStatistics
from glm_rlhf.engine.rollout.scheduling.sequence_state import PromptState, SequenceState, states_of

__all__ = ["Planned", "Scheduler"]


@dataclass(frozen=True, slots=True)
class Planned:
    """A sequence in a step."""

    sequence: SequenceState
    num_tokens: int
    """Number of its unfed tokens to feed."""
    samples: bool
    """Whether these are all, so that the next token is sampled."""

    @property
    def is_decode(self) -> bool:
        """Whether it feeds one token and samples the next."""
        return self.samples and self.num_tokens == 1


class Scheduler:
    """Owns the waiting sequences, the running ones of each group, and the pool of pages.

    Args:
        requests: validated.
        num_pages, page_size, max_batch, max_step_tokens, num_groups: as for `GenerationQueue`, validated.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        *,
        num_pages: int,
        page_size: int,
        max_batch: int,
        max_step_tokens: int,
        num_groups: int,
    ) -> None:
        self.pool = PagePool(num_pages)
        self.num_unfinished = sum(request.num_samples for request in requests)
        self.statistics = QueueStatistics()
        self._page_size = page_size
        self._max_batch = max_batch
        self._max_step_tokens = max_step_tokens
        self._groups: list[list[SequenceState]] = [[] for _ in range(num_groups)]  # earliest started first
        self._in_flight: list[list[Planned] | None] = [None] * num_groups
        self._waiting = [(sequence.rank, sequence) for sequence in states_of(requests, page_size)]  # a heap
        self._stalled: set[SequenceState] = set()  # running, but without a free page
        self._holders: list[PromptState] = []  # those with held pages
        self._num_started = 0

    @property
    def num_running(self) -> int:
        """Sequences that own pages."""
        return sum(len(running) for running in self._groups)

    def schedule(self, group: int) -> tuple[list[Planned], list[tuple[int, int]]]:
        """Return the next step of `group` and the page copies before it.

        Unless the step is empty, it is in flight until `on_step_done`.
        """
        planned = self._continue_running(group)
        copies = self._start_waiting(group, planned)
        if planned:
            self._in_flight[group] = planned
            self._count(num_steps=1, num_tokens=sum(entry.num_tokens for entry in planned))
        elif self.num_unfinished:
            self._count(num_skips=1)
        return planned, copies

    def on_step_done(self, group: int) -> None:
        """Record that the tokens of the step in flight are in the cache."""
        for entry in self._in_flight[group] or ():
            sequence, prompt = entry.sequence, entry.sequence.prompt
            sequence.num_cached += entry.num_tokens
            if prompt.prefiller is sequence and sequence.num_cached >= prompt.num_reused:
                self._end_prefill(prompt)
        self._in_flight[group] = None

    def shrink(self) -> int:
        """Cancel the steps in flight, preempt all running sequences, and halve the size of later steps.

        Returns:
            The new limit of tokens per step and of sequences at once; 0 if the largest step in flight has a
            single token, and nothing changes.
        """
        sizes = [sum(entry.num_tokens for entry in planned) for planned in self._in_flight if planned]
        assert sizes, "no step is in flight that could have been too large"
        most = max(sizes) // 2
        if most:
            self._max_step_tokens, self._max_batch = most, min(self._max_batch, most)
            self._in_flight = [None] * len(self._groups)
            for running in self._groups:
                for sequence in running.copy():
                    self._preempt(sequence)
        return most

    def finish(self, sequence: SequenceState) -> None:
        """End a sequence and release its pages, except those that a waiting sibling can reuse."""
        prompt = sequence.prompt
        self._leave(sequence)
        self.num_unfinished -= 1
        prompt.num_unfinished -= 1
        num_held = 0
        if prompt.num_waiting > 0 and prompt.num_prompt_pages > 0 and prompt.source is None:
            num_held = prompt.num_prompt_pages
            prompt.held_pages = sequence.pages[:num_held]
            self._holders.append(prompt)
        self.pool.release(sequence.pages[num_held:])
        sequence.pages = ()

    def clear(self) -> None:
        """Release all pages and drop all sequences; the pool checks that no page is leaked."""
        for running in self._groups:
            for sequence in running:
                self.pool.release(sequence.pages)
            running.clear()
        while self._holders:
            self._drop_held_pages(self._holders[-1])
        self._in_flight = [None] * len(self._groups)
        self._stalled.clear()
        self._waiting.clear()
        self.num_unfinished = 0
        self.pool.assert_all_free()

    def _continue_running(self, group: int) -> list[Planned]:
        """Return the entries of the sequences that run in `group`, each with the pages it needs."""
        unfed = [(sequence, sequence.num_unfed) for sequence in self._groups[group]]
        # Each decode feeds one token; the rest of the budget is for prefill chunks.
        budget = self._max_step_tokens - sum(num_unfed == 1 for _, num_unfed in unfed)
        planned = []
        for sequence, num_unfed in unfed:
            if sequence.group is None:
                continue  # preempted by an earlier sequence in this loop
            num_tokens = 1 if num_unfed == 1 else min(num_unfed, budget)
            if num_tokens == 0:
                continue
            if not self._grow(sequence, num_tokens):
                self._stalled.add(sequence)
                continue
            self._stalled.discard(sequence)
            budget -= num_tokens if num_unfed > 1 else 0
            planned.append(Planned(sequence, num_tokens, samples=num_tokens == num_unfed))
        return planned

    def _grow(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Return whether `sequence` gets the pages that `num_tokens` more positions need."""
        count = self._num_pages(sequence.num_cached + num_tokens) - len(sequence.pages)
        if count <= 0:
            return True
        # Held pages save the next sibling a prefill, a preemption costs a prefill of all tokens so far: held
        # pages go first. Then the last started sequence yields, as it has computed least and as preempting
        # only later ones lets the earliest always run on. A step in flight reads and writes its pages, so its
        # group yields none. Without a victim the sequence stalls rather than yield its pages itself: with
        # one free page it continues at once.
        while self.pool.num_free < count:
            if self._holders:
                self._drop_held_pages(max(self._holders, key=_last_to_start))
                continue
            victim = self._victim(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.pages += self._take_pages(count)
        return True

    def _victim(self, sequence: SequenceState) -> SequenceState | None:
        """Return the last started sequence of groups without a step in flight; None if it is `sequence`."""
        last = [
            running[-1]
            for running, in_flight in zip(self._groups, self._in_flight, strict=True)
            if running and in_flight is None
        ]
        # The group of `sequence` is one of them, so the victim never started before it.
        victim = max(last, key=_started)
        return None if victim is sequence else victim

    def _preempt(self, sequence: SequenceState) -> None:
        """Release all pages of `sequence` and let it wait, before all sequences that have not started."""
        prompt = sequence.prompt
        self._leave(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_cached = (), 0
        sequence.rank = (0, sequence.started)
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        if prompt.prefiller is sequence:
            self._end_prefill(prompt)
        self._count(num_preemptions=1)

    def _start_waiting(self, group: int, planned: list[Planned]) -> list[tuple[int, int]]:
        """Add to `planned` the sequences that start in `group` now; return the page copies they need."""
        copies: list[tuple[int, int]] = []
        budget = self._max_step_tokens - sum(entry.num_tokens for entry in planned)
        while budget > 0 and self._waiting and not self._stalled and self._has_room(group):
            _, sequence = self._waiting[0]
            prompt = sequence.prompt
            if prompt.prefiller is not None:
                heapq.heappop(self._waiting)
                prompt.blocked.append(sequence)
                continue
            if not self._give_first_pages(sequence, copies):
                break
            heapq.heappop(self._waiting)
            if sequence.started < 0:
                sequence.started = self._num_started
                self._num_started += 1
            sequence.group = group
            insort(self._groups[group], sequence, key=_started)
            prompt.running.append(sequence)
            num_tokens = min(sequence.num_unfed, budget)
            budget -= num_tokens
            planned.append(Planned(sequence, num_tokens, samples=num_tokens == sequence.num_unfed))
        return copies

    def _has_room(self, group: int) -> bool:
        """Return whether `group` runs fewer than its even share of the sequences that could run."""
        num_sequences = min(self._max_batch, self.num_unfinished)
        share, rest = divmod(num_sequences, len(self._groups))
        return len(self._groups[group]) < share + (group < rest)

    def _give_first_pages(self, sequence: SequenceState, copies: list[tuple[int, int]]) -> bool:
        """Return whether `sequence` gets the pages of all its tokens, from its siblings or new.

        One page per running sequence stays free: each needs its next page soon, and would otherwise preempt
        this sequence. No sequence is preempted here, so no page in `copies` changes its owner before the
        step.
        """
        prompt = sequence.prompt
        source = prompt.source
        if source is not None:
            reused = source.pages[: prompt.num_full_pages]
        else:
            reused = prompt.held_pages
        count = self._num_pages(sequence.num_unfed) - len(reused)
        while self.pool.num_free < count + self.num_running:
            others = [other for other in self._holders if other is not prompt]
            if not others:
                return False
            self._drop_held_pages(max(others, key=_last_to_start))
        pages = self._take_pages(count)
        if source is not None:
            self.pool.share(reused)
            self._count(num_shared_pages=len(reused))
            if prompt.copies_page:
                copies.append((source.pages[prompt.num_full_pages], pages[0]))
                self._count(num_copied_pages=1)
        elif reused:
            # The held pages become pages of this sequence, and serve later siblings as such.
            self._holders.remove(prompt)
            prompt.held_pages = ()
            self._count(num_shared_pages=len(reused))
        elif prompt.num_reused > 0:
            prompt.prefiller = sequence
        sequence.pages = reused + pages
        if source is not None or reused:
            sequence.num_cached = prompt.num_reused
        return True

    def _end_prefill(self, prompt: PromptState) -> None:
        """Unblock the samples of `prompt`."""
        prompt.prefiller = None
        for sequence in prompt.blocked:
            heapq.heappush(self._waiting, (sequence.rank, sequence))
        prompt.blocked.clear()

    def _leave(self, sequence: SequenceState) -> None:
        """Remove `sequence` from its group."""
        assert sequence.group is not None
        self._groups[sequence.group].remove(sequence)
        sequence.prompt.running.remove(sequence)
        sequence.group = None
        self._stalled.discard(sequence)

    def _drop_held_pages(self, prompt: PromptState) -> None:
        """Release the pages held for the waiting samples of `prompt`: the next one computes them again."""
        assert prompt.held_pages, f"record {prompt.request.index} holds no pages"
        self._holders.remove(prompt)
        self.pool.release(prompt.held_pages)
        prompt.held_pages = ()

    def _num_pages(self, num_positions: int) -> int:
        return -(-num_positions // self._page_size)

    def _take_pages(self, count: int) -> tuple[int, ...]:
        pages = tuple(self.pool.take(count))
        num_owned = self.pool.num_pages - self.pool.num_free
        if num_owned > self.statistics.peak_pages:
            self.statistics = replace(self.statistics, peak_pages=num_owned)
        return pages

    def _count(self, **added: int) -> None:
        """Add to the statistics."""
        totals = {name: getattr(self.statistics, name) + number for name, number in added.items()}
        self.statistics = replace(self.statistics, **totals)


def _started(sequence: SequenceState) -> int:
    return sequence.started


def _last_to_start(prompt: PromptState) -> tuple[int, int, int]:
    """Return a key that is greater for prompts whose samples start later."""
    request = prompt.request
    return -request.max_new_tokens, -len(request.prompt), request.index
