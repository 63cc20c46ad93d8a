"""The queue of generation: returns step plans and takes sampled tokens; continuous batching, no tensors."""

from collections.abc import Callable, Sequence
from typing import Literal

from glm_rlhf.engine.rollout.scheduling.page_pool import PagePool
from glm_rlhf.engine.rollout.scheduling.requests import (
    Completion,
    GenerationRequest,
    NonFiniteLogits,
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
    """All sequences of one phase of generation, their pages and their groups.

    Ranks that make the same calls in the same order get the same steps. For each group: `next`, then, if it
    returned a step, `take`, before its next `next`. With several groups: next(0), next(1), …, next(G − 1),
    take(0), next(0), take(1), next(1), … Between `next` and `take` a group's step is in flight: its sequences
    and pages do not change. The module `scheduler` states the rules of running, sharing and preemption.

    Args:
        requests: the prompts; their indices differ.
        num_pages: pages of the cache, owned by this queue until `close`.
        page_size: positions per page.
        max_batch: most sequences that run at once, over all groups; at least one per group.
        max_step_tokens: most tokens fed in one step; at least a group's share of `max_batch`.
        num_groups: groups that alternate, at least the number of pipeline stages.
        stop_check: called with a sequence's sampled tokens after each new one; returns whether it ends.

    Raises:
        ValueError: a request (named by its index) cannot be answered, or a limit is invalid.
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
        self._in_flight: list[list[SequenceState] | None] = [None] * num_groups  # those that sample, in order

    @property
    def pool(self) -> PagePool:
        """The pages and their owners; read only."""
        return self._scheduler.pool

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is complete, or the queue was closed."""
        return self._scheduler.num_unfinished == 0

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
        """Counts so far."""
        return self._scheduler.statistics

    def next(self, group: int) -> StepPlan | None:
        """Return the next step of `group`, or None if it has nothing to do; other groups may have."""
        assert self._in_flight[group] is None, f"next({group}) although its step is in flight"
        planned, copies = self._scheduler.schedule(group)
        if not planned:
            return None
        decodes = [entry for entry in planned if entry.is_decode]
        prefills = [entry for entry in planned if not entry.is_decode]
        self._in_flight[group] = [entry.sequence for entry in decodes + prefills if entry.samples]
        return StepPlan(
            copies=tuple(copies),
            decodes=tuple(self._work(entry) for entry in decodes),
            prefills=tuple(self._work(entry) for entry in prefills),
        )

    def take(
        self,
        group: int,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        untempered_logprobs: Sequence[float],
    ) -> list[Completion]:
        """Return the sequences that end with the tokens sampled in the last step of `group`.

        Args:
            group: the group of the step in flight.
            tokens: sampled ids: of the decodes, then of the prefills that sample, in the step's order.
            logprobs: of each token, under the sampling distribution.
            untempered_logprobs: of each token, under the model's untempered distribution.

        Raises:
            ValueError: another number of tokens than the step samples; nothing is changed.
            NonFiniteLogits: a token is -1; nothing is changed.
        """
        sequences = self._in_flight[group]
        assert sequences is not None, f"take({group}) without a step in flight"
        counts = (len(tokens), len(logprobs), len(untempered_logprobs))
        if counts != (len(sequences),) * 3:
            raise ValueError(
                f"take({group}) was given {counts} tokens, logprobs and untempered logprobs; the step "
                f"samples {len(sequences)}: one for each decode, then one for each prefill that samples"
            )
        without_token = [sequence for sequence, token in zip(sequences, tokens, strict=True) if token < 0]
        if without_token:
            raise NonFiniteLogits(sorted({sequence.prompt.request.index for sequence in without_token}))
        self._in_flight[group] = None
        self._scheduler.on_step_done(group)
        completions = []
        for sequence, *sampled in zip(sequences, tokens, logprobs, untempered_logprobs, strict=True):
            sequence.tokens.append(int(sampled[0]))
            sequence.logprobs.append(float(sampled[1]))
            sequence.untempered_logprobs.append(float(sampled[2]))
            reason = self._finish_reason(sequence)
            if reason is not None:
                self._scheduler.finish(sequence)
                completions.append(_completion(sequence, reason))
        return completions

    def shrink(self) -> int:
        """Cancel the steps in flight, preempt all running sequences, and halve the size of later steps.

        For a single group only: with several, each must keep a sequence.

        Returns:
            The new limit of tokens per step and of sequences at once; 0 if the step in flight has a single
            token, and nothing changes.
        """
        most = self._scheduler.shrink()
        if most:
            self._in_flight = [None] * len(self._in_flight)
        return most

    def close(self) -> None:
        """Release all pages and drop all sequences, also before they end; may be called twice.

        The pool checks that no page is leaked.
        """
        self._in_flight = [None] * len(self._in_flight)
        self._scheduler.clear()

    def _work(self, entry: Planned) -> SequenceWork:
        sequence, end = entry.sequence, entry.sequence.num_cached + entry.num_tokens
        return SequenceWork(
            sequence=sequence.identity,
            tokens=sequence.unfed_tokens(entry.num_tokens),
            start=sequence.num_cached,
            pages=sequence.pages[: -(-end // self._page_size)],
            samples=entry.samples,
            seed=sequence.seed,
            num_generated=len(sequence.tokens),
        )

    def _finish_reason(self, sequence: SequenceState) -> Literal["stop", "length"] | None:
        """Return why `sequence` ends with its last token, or None if it does not."""
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
