"""Any batching, sharing and preemption gives each sequence the answer that it has alone."""

from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from paged_toy import VOCABULARY, PagedMemory, Simulation, answer_alone

from glm_rlhf.engine.rollout.scheduling import scheduler
from glm_rlhf.engine.rollout.scheduling.page_pool import PagePool
from glm_rlhf.engine.rollout.scheduling.request_queue import GenerationQueue, GenerationRequest
from glm_rlhf.engine.rollout.scheduling.scheduler import Scheduler
from glm_rlhf.engine.rollout.scheduling.sequence_state import PromptState, SequenceState


@dataclass(frozen=True)
class Case:
    """A queue and how it is run."""

    requests: tuple[GenerationRequest, ...]
    spare_pages: int  # beyond what the longest request needs
    page_size: int
    max_batch: int
    spare_step_tokens: int  # beyond a group's share of max_batch
    num_groups: int
    has_stop_check: bool
    order: int  # seed of the order in which steps in flight are computed

    @property
    def limits(self):
        positions = max(len(one.prompt) + one.max_new_tokens for one in self.requests)
        return {
            "num_pages": -(-positions // self.page_size) + self.spare_pages,
            "page_size": self.page_size,
            "max_batch": self.max_batch,
            "max_step_tokens": -(-self.max_batch // self.num_groups) + self.spare_step_tokens,
            "num_groups": self.num_groups,
        }

    def simulation(self):
        queue = GenerationQueue(self.requests, **self.limits, stop_check=self.stop_check)
        limits = {name: number for name, number in self.limits.items() if name != "num_pages"}
        return Simulation(queue=queue, order=Random(self.order), **limits)

    @property
    def stop_check(self):
        return (lambda tokens: sum(tokens[-2:]) % 19 == 0) if self.has_stop_check else None

    @property
    def answers(self):
        return {
            (one.index, sample): answer_alone(one, sample, self.stop_check)
            for one in self.requests
            for sample in range(one.num_samples)
        }


@st.composite
def cases(draw):
    num_groups = draw(st.integers(1, 4))
    requests = [
        GenerationRequest(
            index=index,
            prompt=tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=14))),
            num_samples=draw(st.integers(1, 5)),
            max_new_tokens=draw(st.integers(1, 20)),
            stop_ids=frozenset(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))),
            seed=draw(st.integers(0, 3)),
        )
        for index in range(draw(st.integers(1, 6)))
    ]
    return Case(
        requests=tuple(requests),
        spare_pages=draw(st.sampled_from([0, 0, 1, 2, 5, 12, 60])),
        page_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
        max_batch=draw(st.integers(num_groups, 12)),
        spare_step_tokens=draw(st.sampled_from([0, 1, 4, 40])),
        num_groups=num_groups,
        has_stop_check=draw(st.booleans()),
        order=draw(st.integers(0, 99)),
    )


def check(case):
    """Fail unless a case ends with the answers that each sequence has alone, every page given back."""
    simulation = case.simulation()
    completions = simulation.run()
    answers = case.answers
    assert len(completions) == len(answers)
    assert {(done.request, done.sample): done for done in completions} == answers
    assert (simulation.queue.num_running, simulation.queue.num_waiting) == (0, 0)
    simulation.queue.pool.assert_all_free()
    return simulation


@settings(max_examples=250, deadline=None)
@given(cases())
def test_every_sequence_has_the_answer_it_has_alone(case):
    statistics = check(case).queue.statistics
    event(f"preempted: {statistics.num_preemptions > 0}")
    event(f"copied pages: {statistics.num_copied_pages > 0}")


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 30))
def test_a_queue_closed_before_its_end_leaks_no_page(case, num_rounds):
    simulation = case.simulation()
    for _, _completions in zip(range(num_rounds), simulation.rounds(), strict=False):
        pass
    queue = simulation.queue
    queue.close()
    assert queue.pool.num_free == queue.pool.num_pages
    assert queue.is_finished
    assert [queue.next(group) for group in range(case.num_groups)] == [None] * case.num_groups
    queue.close()


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 99))
def test_ranks_agree_and_the_order_of_requests_changes_no_answer(case, seed):
    first = check(case)
    assert check(case).steps == first.steps
    shuffled = list(case.requests)
    Random(seed).shuffle(shuffled)
    check(replace(case, requests=tuple(shuffled)))


def earliest_started(queue):
    """The unfinished sequence that started first; None while it is preempted."""
    scheduler = queue._scheduler
    running = [sequence for group in scheduler._groups for sequence in group]
    waiting = [sequence for _, sequence in scheduler._waiting]
    blocked = [sibling for sequence in running for sibling in sequence.prompt.blocked]
    begun = [sequence for sequence in running + waiting + blocked if sequence.started >= 0]
    first = min(begun, key=lambda sequence: sequence.started, default=None)
    return None if first is None or first.group is None else first


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_sequence_starves(case):
    simulation, num_rounds = case.simulation(), 0
    first, num_cached, started = None, 0, {}
    for completions in simulation.rounds():
        num_rounds += 1
        for group in simulation.queue._scheduler._groups:
            for sequence in group:
                assert started.setdefault(sequence.identity, sequence.started) == sequence.started
        ended = {(done.request, done.sample) for done in completions}
        if first is not None and (first.prompt.request.index, first.sample) not in ended:
            # What started before all others loses nothing until it ends.
            assert earliest_started(simulation.queue) is first
            assert first.num_cached >= num_cached
        first = earliest_started(simulation.queue)
        num_cached = 0 if first is None else first.num_cached
    # One after the other, one token per round, they would take that long; twice allows for repeated work.
    alone = sum((len(one.prompt) + one.max_new_tokens) * one.num_samples for one in case.requests)
    assert num_rounds <= 2 * alone


def no_copies(memory, step):
    pass


def forget_owner(pool, pages):
    pass


def victim_in_flight(self, sequence):
    last = [running[-1] for running in self._groups if running]
    victim = max(last, key=lambda one: one.started)
    return victim if victim.started > sequence.started else None


def prompt_only(sequence, count):
    tokens = (*sequence.prompt.request.prompt, *([0] * len(sequence.tokens)))
    return tokens[sequence.num_cached : sequence.num_cached + count]


def lose_pages(self, sequence):
    self._leave(sequence)
    self.num_unfinished -= 1
    sequence.prompt.num_unfinished -= 1


def put_last(group, sequence, key):
    group.append(sequence)


@pytest.mark.parametrize(
    "owner, name, mistake",
    [
        (scheduler, "insort", put_last),
        (PagedMemory, "copy", no_copies),
        (PagePool, "share", forget_owner),
        (Scheduler, "_victim", victim_in_flight),
        (Scheduler, "_has_room", lambda self, group: True),
        (Scheduler, "finish", lose_pages),
        (SequenceState, "unfed_tokens", prompt_only),
        (PromptState, "num_reused", property(lambda prompt: len(prompt.request.prompt))),
        (PromptState, "copies_page", property(lambda prompt: False, lambda prompt, value: None)),
        (PromptState, "source", property(lambda prompt: (prompt.running or [None])[-1])),
    ],
)
def test_a_planted_mistake_is_detected(monkeypatch, owner, name, mistake):
    monkeypatch.setattr(owner, name, mistake)

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(cases())
    def check_any(case):
        check(case)

    with pytest.raises((AssertionError, IndexError, KeyError)):
        check_any()
