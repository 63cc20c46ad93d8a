"""Decides which sequences run, on which pages.

Waiting: largest max_new_tokens first, then longest prompt, then the caller's order, samples of a prompt side
by side. Long work first leaves short work for the end, when the batch can no longer be filled. A preempted
sequence goes before all that have not started.

Samples of one prompt: the first one started prefills the prompt, its siblings are parked until all but the
prompt's last token is in the cache. A sibling then shares the pages before the one that holds the last prompt
token, gets a copy of that one if it holds anything else, and feeds the last prompt token again. Feeding it
again costs one token, and draws the sibling's first token as every other token is drawn: by a forward of its
own row, with its own seed, at num_generated = 0. Nothing is written to a shared page: the pages before the
copied one are full. If a sample finishes while siblings wait and none of them runs, its prompt pages are kept
for the next one, but given up before any sequence is preempted, and to what starts before that one.

Pages: a sequence gets the pages of all tokens it has when it starts, later one at a time. Without a free page
it preempts the most recently started sequence, if that started after it, of the groups that have no step in
flight. If there is none, it keeps its pages and sits out, and nothing is started before it moves again. The
earliest started sequence is preempted by nobody and fits alone, so each sequence finishes.
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
    """A sequence of a step."""

    sequence: SequenceState
    num_tokens: int
    """How many of its unfed tokens it feeds."""
    samples: bool
    """Whether they are all, so that the next token can be drawn."""

    @property
    def is_decode(self) -> bool:
        """Whether it feeds one token and draws the next."""
        return self.samples and self.num_tokens == 1


class Scheduler:
    """Who waits, who runs in which group and who owns which page.

    Args:
        requests: checked.
        num_pages, page_size, max_batch, max_step_tokens, num_groups: as for `GenerationQueue`, checked.
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
        self._stalled: set[SequenceState] = set()  # sit out for want of a page
        self._holders: list[PromptState] = []  # those with held pages
        self._num_started = 0

    @property
    def num_running(self) -> int:
        """Sequences that own pages."""
        return sum(len(running) for running in self._groups)

    def schedule(self, group: int) -> tuple[list[Planned], list[tuple[int, int]]]:
        """Return what `group` does now and the copies of pages before it.

        If it does anything, its step is in flight until `on_step_done`.
        """
        planned = self._continue_running(group)
        copies = self._start_waiting(group, planned)
        if planned:
            self._in_flight[group] = planned
            self._count(num_steps=1, num_tokens=sum(one.num_tokens for one in planned))
        elif self.num_unfinished:
            self._count(num_skips=1)
        return planned, copies

    def on_step_done(self, group: int) -> None:
        """Note that the tokens of the step in flight are in the cache."""
        for one in self._in_flight[group] or ():
            sequence, prompt = one.sequence, one.sequence.prompt
            sequence.num_cached += one.num_tokens
            if prompt.prefiller is sequence and sequence.num_cached >= prompt.num_reused:
                self._end_prefill(prompt)
        self._in_flight[group] = None

    def shrink(self) -> int:
        """Give up the steps in flight and preempt all that run; feed half as much a step from here on.

        Returns:
            The most tokens a step, and sequences at once, from now on; 0 where the largest step that was in
            flight had a single token, and nothing changes.
        """
        sizes = [sum(one.num_tokens for one in planned) for planned in self._in_flight if planned]
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
        """End a sequence; its pages go back, but for those that a waiting sibling can use."""
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
        """Take all pages back and forget all sequences; the pool checks that no page was lost."""
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
        """Return the work of the sequences that run in `group`, each with the pages it needs."""
        unfed = [(sequence, sequence.num_unfed) for sequence in self._groups[group]]
        # Every decode feeds one token; what they leave is for chunks.
        budget = self._max_step_tokens - sum(num_unfed == 1 for _, num_unfed in unfed)
        planned = []
        for sequence, num_unfed in unfed:
            if sequence.group is None:
                continue  # preempted by an earlier one just now
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
        """Return whether `sequence` could be given the pages that `num_tokens` more positions need."""
        count = self._num_pages(sequence.num_cached + num_tokens) - len(sequence.pages)
        if count <= 0:
            return True
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
        """Return the last started of the groups without a step in flight, or None if that is `sequence`."""
        last = [
            running[-1]
            for running, in_flight in zip(self._groups, self._in_flight, strict=True)
            if running and in_flight is None
        ]
        # The group of `sequence` is one of them, so that the victim never started before it.
        victim = max(last, key=_started)
        return None if victim is sequence else victim

    def _preempt(self, sequence: SequenceState) -> None:
        """Take every page from `sequence` and put it before all that wait and have not started."""
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
        """Add to `planned` what starts in `group` now; return the copies of pages it needs."""
        copies: list[tuple[int, int]] = []
        budget = self._max_step_tokens - sum(one.num_tokens for one in planned)
        while budget > 0 and self._waiting and not self._stalled and self._has_room(group):
            _, sequence = self._waiting[0]
            prompt = sequence.prompt
            if prompt.prefiller is not None:
                heapq.heappop(self._waiting)
                prompt.parked.append(sequence)
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
        """Return whether `group` runs less than its even share of the sequences that could run."""
        num_sequences = min(self._max_batch, self.num_unfinished)
        share, rest = divmod(num_sequences, len(self._groups))
        return len(self._groups[group]) < share + (group < rest)

    def _give_first_pages(self, sequence: SequenceState, copies: list[tuple[int, int]]) -> bool:
        """Return whether `sequence` could be given the pages of all its tokens, from its siblings or new.

        One page for each running sequence is left over: each needs its next page soon, and would have to
        preempt this one. Nobody is preempted here, so no page in `copies` changes hands before the step.
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
            # They change their owner; as its pages they serve the siblings after it.
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
        """Let the parked samples of `prompt` start."""
        prompt.prefiller = None
        for sequence in prompt.parked:
            heapq.heappush(self._waiting, (sequence.rank, sequence))
        prompt.parked.clear()

    def _leave(self, sequence: SequenceState) -> None:
        """Take `sequence` out of its group."""
        assert sequence.group is not None
        self._groups[sequence.group].remove(sequence)
        sequence.prompt.running.remove(sequence)
        sequence.group = None
        self._stalled.discard(sequence)

    def _drop_held_pages(self, prompt: PromptState) -> None:
        """Free the pages that `prompt` keeps for its waiting samples: the next one computes them again."""
        assert prompt.held_pages, f"record {prompt.request.index} keeps no pages"
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
