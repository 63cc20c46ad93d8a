"""Hands out the steps of generation and takes in what they drew: continuous batching without a tensor."""

from collections.abc import Callable, Sequence
from typing import Literal

from glm_rlhf.engine.rollout.scheduling.page_pool import PagePool
from glm_rlhf.engine.rollout.scheduling.requests import (
    Completion,
    GenerationRequest,
    QueueStatistics,
    sample_seed,
)
from glm_rlhf.engine.rollout.scheduling.scheduler import Planned, Scheduler
from glm_rlhf.engine.rollout.scheduling.sequence_state import SequenceState
from glm_rlhf.engine.rollout.scheduling.validation import check_limits, check_requests
from glm_rlhf.parallel.inference.step_plan import SequenceWork, StepPlan

__all__ = [
    "Completion",
    "GenerationQueue",
    "GenerationRequest",
    "QueueStatistics",
    "SequenceWork",
    "StepPlan",
    "sample_seed",
]


class GenerationQueue:
    """All sequences of one phase of generation, the pages they own and the groups they run in.

    Ranks that make the same calls in the same order get the same steps. For each group: `next`, then, if it
    gave a step, `take`, before its next `next`. With several groups: next(0), next(1), …, next(G − 1),
    take(0), next(0), take(1), next(1), … Between `next` and `take` a group's step is in flight: its sequences
    and their pages are left alone. `roster` tells the rules by which sequences run, share, wait and yield.

    Args:
        requests: the prompts; their indices differ.
        num_pages: pages of the cache, owned by this queue from now to `close`.
        page_size: positions a page.
        max_batch: the most sequences that run at once, over all groups; at least one a group.
        max_step_tokens: the most tokens fed in one step; at least a group's share of `max_batch`.
        num_groups: groups that take turns, at least the number of pipeline stages.
        stop_check: given the tokens drawn for a sequence after each new one, says whether it ends there.

    Raises:
        ValueError: a request (named by its index) cannot be answered, or a limit does not fit.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        *,
        num_pages: int,
        page_size: int,
        max_batch: int,
        max_step_tokens: int,
        num_groups: int = 1,
        stop_check: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        check_limits(num_pages, page_size, max_batch, max_step_tokens, num_groups)
        check_requests(requests, num_pages * page_size)
        self._scheduler = Scheduler(
            requests,
            num_pages=num_pages,
            page_size=page_size,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            num_groups=num_groups,
        )
        self._page_size = page_size
        self._stop_check = stop_check
        self._in_flight: list[list[SequenceState] | None] = [None] * num_groups  # those that draw, in order

    @property
    def pool(self) -> PagePool:
        """Who owns which page; for reading."""
        return self._scheduler.pool

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is complete, or the queue was closed."""
        return self._scheduler.num_unfinished == 0

    @property
    def drawing(self) -> list[int]:
        """Requests for which the steps in flight draw a token."""
        steps = [step for step in self._in_flight if step]
        return sorted({sequence.prompt.request.index for step in steps for sequence in step})

    @property
    def num_running(self) -> int:
        """Sequences that own pages now."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started or were preempted."""
        return self._scheduler.num_unfinished - self._scheduler.num_running

    @property
    def statistics(self) -> QueueStatistics:
        """What was done so far."""
        return self._scheduler.statistics

    def next(self, group: int) -> StepPlan | None:
        """Return what `group` does now, or None if it has nothing to do; other groups may have."""
        assert self._in_flight[group] is None, f"next({group}) although its step is in flight"
        planned, copies = self._scheduler.schedule(group)
        if not planned:
            return None
        decodes = [one for one in planned if one.is_decode]
        prefills = [one for one in planned if not one.is_decode]
        self._in_flight[group] = [one.sequence for one in decodes + prefills if one.samples]
        return StepPlan(
            copies=tuple(copies),
            decodes=tuple(self._work(one) for one in decodes),
            prefills=tuple(self._work(one) for one in prefills),
        )

    def take(
        self,
        group: int,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        untempered_logprobs: Sequence[float],
    ) -> list[Completion]:
        """Return the sequences that end with the tokens drawn in the last step of `group`.

        Args:
            group: whose step is in flight.
            tokens: the drawn ids: of the decodes, then of the prefills that sample, in the step's order.
            logprobs: of each, under the distribution it was drawn from.
            plain_logprobs: of each, under the model's own distribution.

        Raises:
            ValueError: not as many as the step draws; nothing was taken.
        """
        drawing = self._in_flight[group]
        assert drawing is not None, f"take({group}) without a step in flight"
        given = (len(tokens), len(logprobs), len(untempered_logprobs))
        if given != (len(drawing),) * 3:
            raise ValueError(
                f"take({group}) was given {given} tokens, logprobs and plain logprobs; the step draws "
                f"{len(drawing)}: one for each decode, then one for each prefill that samples"
            )
        self._in_flight[group] = None
        self._scheduler.on_step_done(group)
        completions = []
        for sequence, *drawn in zip(drawing, tokens, logprobs, untempered_logprobs, strict=True):
            sequence.tokens.append(int(drawn[0]))
            sequence.logprobs.append(float(drawn[1]))
            sequence.untempered_logprobs.append(float(drawn[2]))
            reason = self._finish_reason(sequence)
            if reason is not None:
                self._scheduler.finish(sequence)
                completions.append(_completion(sequence, reason))
        return completions

    def shrink(self) -> int:
        """Give up the steps in flight, whose sequences wait again, and make those to come half as large.

        For one group: with several each would have to keep a sequence.

        Returns:
            The most tokens of a step from now on, and the most sequences at once; 0 where a step of a single
            token was in flight, which stays.
        """
        most = self._scheduler.shrink()
        if most:
            self._in_flight = [None] * len(self._in_flight)
        return most

    def close(self) -> None:
        """Give every page back and forget all sequences, also in mid-run; may be called twice.

        The pool checks that no page was lost.
        """
        self._in_flight = [None] * len(self._in_flight)
        self._scheduler.clear()

    def _work(self, one: Planned) -> SequenceWork:
        sequence, end = one.sequence, one.sequence.num_cached + one.num_tokens
        return SequenceWork(
            sequence=sequence.identity,
            tokens=sequence.unfed_tokens(one.num_tokens),
            start=sequence.num_cached,
            pages=sequence.pages[: -(-end // self._page_size)],
            samples=one.samples,
            seed=sequence.seed,
            num_generated=len(sequence.tokens),
        )

    def _finish_reason(self, sequence: SequenceState) -> Literal["stop", "length"] | None:
        """Return why `sequence` ends with the token drawn last, or None if it does not."""
        request = sequence.prompt.request
        if sequence.tokens[-1] in request.stop_ids:
            return "stop"
        if self._stop_check is not None and self._stop_check(sequence.tokens):
            return "stop"
        return "length" if len(sequence.tokens) >= request.max_new_tokens else None


def _completion(sequence: SequenceState, reason: Literal["stop", "length"]) -> Completion:
    return Completion(
        request=sequence.prompt.request.index,
        sample=sequence.sample,
        tokens=tuple(sequence.tokens),
        logprobs=tuple(sequence.logprobs),
        untempered_logprobs=tuple(sequence.untempered_logprobs),
        finish_reason=reason,
    )
