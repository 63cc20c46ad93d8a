"""Steps worked out by hand: chunks, shared pages, preemption, groups."""

import pytest

from glm_rlhf.engine.rollout.scheduling.request_queue import GenerationQueue, GenerationRequest, sample_seed


def request(index, prompt, *, max_new_tokens, num_samples=1, stop_ids=()):
    return GenerationRequest(
        index=index,
        prompt=tuple(prompt),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(stop_ids),
        seed=100 + index,
    )


def queue_of(*requests, num_pages=100, page_size=4, max_batch=8, max_step_tokens=64, **others):
    return GenerationQueue(
        requests,
        num_pages=num_pages,
        page_size=page_size,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        **others,
    )


def take(queue, group, *tokens):
    return queue.take(group, tokens, [-1.0] * len(tokens), [-2.0] * len(tokens))


def shape(works):
    """What the works are, but for their seeds: sequence, tokens, start, pages, samples, num_generated."""
    return [
        (work.sequence, work.tokens, work.start, work.pages, work.samples, work.num_generated)
        for work in works
    ]


def test_one_sequence_from_prompt_to_stop():
    queue = queue_of(request(7, [5, 6, 7], max_new_tokens=9, stop_ids=[2, 3]), page_size=2)
    step = queue.next(0)
    assert (step.copies, step.decodes) == ((), ())
    assert shape(step.prefills) == [(0, (5, 6, 7), 0, (0, 1), True, 0)]
    assert step.prefills[0].seed == sample_seed(107, 0)
    assert take(queue, 0, 20) == []
    step = queue.next(0)
    assert shape(step.decodes) == [(0, (20,), 3, (0, 1), True, 1)]
    assert take(queue, 0, 21) == []
    step = queue.next(0)
    assert shape(step.decodes) == [(0, (21,), 4, (0, 1, 2), True, 2)]
    (done,) = queue.take(0, [3], [-0.5], [-0.7])
    assert (done.request, done.sample, done.finish_reason) == (7, 0, "stop")
    assert (done.tokens, done.logprobs, done.untempered_logprobs) == (
        (20, 21, 3),
        (-1, -1, -0.5),
        (-2, -2, -0.7),
    )
    assert queue.is_finished
    assert queue.next(0) is None
    queue.pool.assert_all_free()


@pytest.mark.parametrize("last, reason", [(9, "length"), (2, "stop")])
def test_the_last_token_allowed_is_length_unless_it_stops(last, reason):
    queue = queue_of(request(0, [5], max_new_tokens=2, stop_ids=[2]))
    queue.next(0)
    take(queue, 0, 8)
    queue.next(0)
    (done,) = take(queue, 0, last)
    assert (done.tokens, done.finish_reason) == ((8, last), reason)


def test_the_stop_check_sees_the_answer_so_far():
    seen = []

    def stop_check(tokens):
        seen.append(tuple(tokens))
        return len(tokens) == 2

    queue = queue_of(request(0, [5], max_new_tokens=9), stop_check=stop_check)
    queue.next(0)
    take(queue, 0, 8)
    queue.next(0)
    (done,) = take(queue, 0, 9)
    assert seen == [(8,), (8, 9)]
    assert (done.tokens, done.finish_reason) == ((8, 9), "stop")


def test_a_prompt_is_prefilled_in_chunks_in_steps_with_decodes():
    # 4 tokens per step; the long prompt waits first, as max_new_tokens are equal.
    queue = queue_of(
        request(0, [1], max_new_tokens=5),
        request(1, range(10, 19), max_new_tokens=5),
        max_step_tokens=4,
        max_batch=2,
    )
    step = queue.next(0)
    assert (shape(step.decodes), shape(step.prefills)) == ([], [(1, (10, 11, 12, 13), 0, (0,), False, 0)])
    assert take(queue, 0) == []
    step = queue.next(0)
    assert shape(step.prefills) == [(1, (14, 15, 16, 17), 4, (0, 1), False, 0)]
    take(queue, 0)
    step = queue.next(0)
    # The last token of a chunked prompt is one token that draws: a decode. Its pages were set aside at once.
    assert shape(step.decodes) == [(1, (18,), 8, (0, 1, 2), True, 0), (0, (1,), 0, (3,), True, 0)]
    take(queue, 0, 30, 31)
    step = queue.next(0)
    assert shape(step.decodes) == [(1, (30,), 9, (0, 1, 2), True, 1), (0, (31,), 1, (3,), True, 1)]


def test_decodes_come_before_chunks_when_a_step_is_full():
    queue = queue_of(
        request(0, [1, 2], max_new_tokens=6),
        request(1, range(10, 19), max_new_tokens=5),
        max_step_tokens=3,
        max_batch=2,
    )
    queue.next(0)
    take(queue, 0, 30)
    for chunk in ((11, 12), (13, 14), (15, 16), (17, 18)):
        step = queue.next(0)
        assert len(step.decodes) == 1
        assert step.prefills[0].tokens == chunk
        take(queue, 0, *([40] * (1 + step.prefills[0].samples)))


def test_samples_share_full_pages_and_copy_the_partly_filled_one():
    # Positions 0 … 5 on pages of 4: page 0 is full and shared, page 1 holds position 4 and is copied.
    queue = queue_of(request(0, range(10, 16), max_new_tokens=5, num_samples=3))
    step = queue.next(0)
    assert shape(step.prefills) == [(0, (10, 11, 12, 13, 14, 15), 0, (0, 1), True, 0)]
    take(queue, 0, 30)
    step = queue.next(0)
    assert step.copies == ((1, 2), (1, 3))
    assert shape(step.decodes) == [
        (0, (30,), 6, (0, 1), True, 1),
        (1, (15,), 5, (0, 2), True, 0),
        (2, (15,), 5, (0, 3), True, 0),
    ]
    assert [work.seed for work in step.decodes] == [sample_seed(100, sample) for sample in range(3)]
    assert [queue.pool.num_owners(page) for page in range(5)] == [3, 1, 1, 1, 0]
    assert queue.statistics.num_shared_pages == queue.statistics.num_copied_pages == 2


def test_a_page_that_starts_with_the_last_prompt_token_needs_no_copy():
    queue = queue_of(request(0, range(10, 15), max_new_tokens=5, num_samples=2))
    queue.next(0)
    take(queue, 0, 30)
    step = queue.next(0)
    assert step.copies == ()
    assert shape(step.decodes) == [(0, (30,), 5, (0, 1), True, 1), (1, (14,), 4, (0, 2), True, 0)]


def test_samples_of_a_prompt_of_one_token_need_not_wait():
    queue = queue_of(request(0, [9], max_new_tokens=5, num_samples=3))
    assert [work.sequence for work in queue.next(0).decodes] == [0, 1, 2]


def test_other_prompts_run_while_samples_wait_for_their_prompt():
    queue = queue_of(
        request(0, range(10, 19), max_new_tokens=5, num_samples=2),
        request(1, [3, 4], max_new_tokens=5),
        max_step_tokens=10,
    )
    step = queue.next(0)
    assert [work.sequence for work in step.prefills] == [0, 2]
    take(queue, 0, 30)
    step = queue.next(0)
    assert [(work.sequence, work.start) for work in step.decodes] == [(0, 9), (2, 1), (1, 8)]


def test_prompt_pages_outlive_their_sample_while_another_waits():
    queue = queue_of(request(0, range(10, 16), max_new_tokens=1, num_samples=3), max_batch=1)
    fed = []
    while not queue.is_finished:
        step = queue.next(0)
        assert step.copies == ()  # the pages pass from one to the next
        fed.append([(work.start, work.tokens, work.pages) for work in (*step.decodes, *step.prefills)])
        take(queue, 0, 30)
    assert fed == [[(0, tuple(range(10, 16)), (0, 1))], [(5, (15,), (0, 1))], [(5, (15,), (0, 1))]]
    queue.pool.assert_all_free()


def test_held_prompt_pages_are_released_before_a_sequence_is_preempted():
    queue = queue_of(
        request(0, [1, 2], max_new_tokens=6),
        request(1, [3, 4, 5], max_new_tokens=1, num_samples=2),
        num_pages=4,
        page_size=2,
        max_batch=2,
    )
    step = queue.next(0)
    assert [(work.sequence, work.pages) for work in step.prefills] == [(0, (0,)), (1, (1, 2))]
    (done,) = take(queue, 0, 10, 30)
    assert (done.request, done.sample) == (1, 0)
    assert queue.pool.num_owners(1) == 1  # kept for sample 1, which must leave a page to sequence 0
    tables = []
    for token in (11, 12, 13, 14, 15):
        (work,) = queue.next(0).decodes
        tables.append(work.pages)
        done = take(queue, 0, token)
    assert tables == [(0, 2), (0, 2), (0, 2, 3), (0, 2, 3), (0, 2, 3, 1)]
    assert (done[0].request, queue.statistics.num_preemptions) == (0, 0)
    assert shape(queue.next(0).prefills) == [(2, (3, 4, 5), 0, (0, 1), True, 0)]


def test_held_prompt_pages_are_released_for_what_starts_before_the_next_sample():
    queue = queue_of(
        request(0, [1], max_new_tokens=8),
        request(1, [2, 2, 2], max_new_tokens=3, num_samples=2),
        request(2, [3, 3, 3], max_new_tokens=2),
        num_pages=9,
        page_size=1,
        max_batch=3,
    )
    step = queue.next(0)
    assert [work.sequence for work in (*step.decodes, *step.prefills)] == [0, 1, 3]
    take(queue, 0, 10, 20, 30)
    assert [work.sequence for work in queue.next(0).decodes] == [0, 1]  # no page for 3
    take(queue, 0, 11, 21)
    assert [work.sequence for work in queue.next(0).decodes] == [0, 1]  # 3 is preempted for a page of 0
    (done,) = take(queue, 0, 12, 22)
    assert (done.request, done.sample, queue.pool.num_free) == (1, 0, 9 - 3 - 2)  # 0 has 3, 2 are kept
    # 0 takes one; 3 needs 4, which leaves none for 0 unless the 2 held pages are released. 2 waits.
    step = queue.next(0)
    assert ([work.sequence for work in step.decodes], len(step.prefills)) == ([0], 1)
    assert (step.prefills[0].sequence, step.prefills[0].tokens) == (3, (3, 3, 3, 30))
    assert (queue.num_waiting, queue.pool.num_free) == (1, 1)


def test_a_preempted_sample_takes_over_the_prompt_of_one_that_ended():
    queue = queue_of(request(0, [5, 6, 7], max_new_tokens=5, num_samples=2), num_pages=4, page_size=2)
    queue.next(0)
    take(queue, 0, 10)
    assert [work.pages for work in queue.next(0).decodes] == [(0, 1), (0, 2)]
    take(queue, 0, 11, 20)
    assert [work.pages for work in queue.next(0).decodes] == [(0, 1, 3), (0, 2)]
    take(queue, 0, 12, 21)
    assert [work.pages for work in queue.next(0).decodes] == [(0, 1, 3)]  # sample 1 sits out
    take(queue, 0, 13)
    assert [work.pages for work in queue.next(0).decodes] == [(0, 1, 3, 2)]  # and is preempted
    (done,) = take(queue, 0, 14)
    assert done.tokens == (10, 11, 12, 13, 14)
    assert shape(queue.next(0).prefills) == [(1, (7, 20, 21), 2, (0, 1, 2), True, 2)]


def test_the_last_started_sequence_is_preempted_and_resumes_where_it_was():
    # 2 sequences, 4 pages of 2. Both start with 1 page each for 2 tokens and one left for each.
    queue = queue_of(
        request(0, [1, 2], max_new_tokens=6), request(1, [3, 4], max_new_tokens=5), num_pages=4, page_size=2
    )
    assert shape(queue.next(0).prefills) == [(0, (1, 2), 0, (0,), True, 0), (1, (3, 4), 0, (1,), True, 0)]
    take(queue, 0, 10, 20)
    assert [work.pages for work in queue.next(0).decodes] == [(0, 2), (1, 3)]
    take(queue, 0, 11, 21)
    assert [work.start for work in queue.next(0).decodes] == [3, 3]
    take(queue, 0, 12, 22)
    step = queue.next(
        0
    )  # position 4 of sequence 0 needs a page: sequence 1 is preempted and loses both of its pages
    assert shape(step.decodes) == [(0, (12,), 4, (0, 2, 1), True, 3)]
    assert (queue.num_running, queue.num_waiting, queue.statistics.num_preemptions) == (1, 1, 1)
    for token in (13, 14):
        assert take(queue, 0, token) == []
        assert [work.sequence for work in queue.next(0).decodes] == [0]
    (done,) = take(queue, 0, 15)
    assert done.tokens == (10, 11, 12, 13, 14, 15)
    step = queue.next(0)
    assert shape(step.prefills) == [(1, (3, 4, 20, 21, 22), 0, (0, 1, 2), True, 3)]
    assert step.prefills[0].seed == sample_seed(101, 0)
    take(queue, 0, 23)
    queue.next(0)
    (done,) = take(queue, 0, 24)
    assert done.tokens == (20, 21, 22, 23, 24)


def test_a_group_in_flight_is_not_changed():
    # One sequence in each of two groups; 4 pages of 1: two each after their first draws.
    queue = queue_of(
        request(0, [1], max_new_tokens=3),
        request(1, [3], max_new_tokens=3),
        num_pages=4,
        page_size=1,
        max_batch=2,
        num_groups=2,
    )
    assert [shape(queue.next(group).decodes)[0][0] for group in (0, 1)] == [0, 1]
    for group, token in ((0, 10), (1, 20)):
        take(queue, group, token)
        assert len(queue.next(group).decodes) == 1
    take(queue, 0, 11)
    assert queue.next(0) is None  # sequence 1 started later but is in flight
    take(queue, 1, 21)
    assert queue.next(1) is None  # sequence 0 started earlier
    step = queue.next(0)  # now sequence 1 is not in flight
    assert shape(step.decodes) == [(0, (11,), 2, (0, 2, 1), True, 2)]
    assert queue.statistics.num_preemptions == 1
    assert queue.next(1) is None
    (done,) = take(queue, 0, 12)
    assert done.request == 0


def test_nothing_starts_while_a_sequence_is_stalled():
    queue = queue_of(
        request(0, [1], max_new_tokens=7),
        request(1, [2, 2, 2, 2, 2], max_new_tokens=4, stop_ids=[5]),
        request(2, [3], max_new_tokens=3),
        request(3, [4], max_new_tokens=2),
        num_pages=9,
        page_size=1,
        max_batch=3,
        num_groups=2,
    )
    assert [work.sequence for work in (*queue.next(0).decodes, *queue.next(1).decodes)] == [0, 2]
    take(queue, 0, 10, 20)
    assert [work.sequence for work in queue.next(0).decodes] == [0, 1]
    take(queue, 1, 30)
    assert queue.next(1) is None  # no page is free and group 0 is in flight
    (done,) = take(queue, 0, 11, 5)
    assert (done.request, queue.pool.num_free) == (1, 6)
    assert [work.sequence for work in queue.next(0).decodes] == [
        0
    ]  # not 3, although pages and a place are free
    assert [work.sequence for work in queue.next(1).decodes] == [2]
    take(queue, 0, 12)
    assert [work.sequence for work in queue.next(0).decodes] == [0, 3]


def test_groups_are_filled_evenly():
    queue = queue_of(*(request(i, [i, i], max_new_tokens=3) for i in range(5)), num_groups=3, max_batch=30)
    assert [len(queue.next(group).prefills) for group in range(3)] == [2, 2, 1]


def test_the_longest_work_starts_first():
    queue = queue_of(
        request(0, [1, 2], max_new_tokens=3),
        request(1, [1], max_new_tokens=4),
        request(2, [1, 2, 3], max_new_tokens=3),
        request(3, [1, 2, 3], max_new_tokens=3),
    )
    step = queue.next(0)
    assert [work.sequence for work in (*step.decodes, *step.prefills)] == [1, 2, 3, 0]


def test_calls_out_of_turn_are_refused():
    queue = queue_of(request(0, [1, 2], max_new_tokens=3))
    with pytest.raises(AssertionError, match="without a step in flight"):
        take(queue, 0)
    queue.next(0)
    with pytest.raises(AssertionError, match="in flight"):
        queue.next(0)
    with pytest.raises(ValueError, match=r"given \(2, 2, 2\) .* samples 1"):
        take(queue, 0, 4, 5)
    with pytest.raises(ValueError, match=r"given \(1, 1, 0\)"):
        queue.take(0, [4], [-1.0], [])
    assert take(queue, 0, 4) == []  # the refused calls changed nothing
