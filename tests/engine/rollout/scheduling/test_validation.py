"""What could never finish is refused before anything runs, with the record's index."""

from dataclasses import replace

import pytest

from glm_rlhf.engine.rollout.scheduling.request_queue import GenerationQueue, GenerationRequest

GOOD = GenerationRequest(index=7, prompt=(1, 2, 3), max_new_tokens=5, stop_ids=frozenset(), seed=0)
LIMITS = {"num_pages": 4, "page_size": 2, "max_batch": 4, "max_step_tokens": 4}


def make(request, **changed):
    return GenerationQueue([replace(GOOD, index=3), request], **{**LIMITS, **changed})


def test_what_just_fits_is_accepted():
    assert make(GOOD).num_waiting == 2  # 3 + 5 positions, 4 pages of 2


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"prompt": ()}, "record 7 has an empty prompt"),
        ({"prompt": (1,) * 9}, "record 7 has a prompt of 9 tokens, longer than the whole cache of 8"),
        ({"prompt": (1,) * 4}, r"record 7 needs up to 4 \+ 5 positions.*has 8"),
        ({"prompt": (1,) * 8, "max_new_tokens": 1}, r"record 7 needs up to 8 \+ 1 positions"),
        ({"max_new_tokens": 0}, "record 7 has max_new_tokens 0"),
        ({"num_samples": 0}, "record 7 asks for 0 samples"),
        ({"index": 3}, "record 3 occurs twice"),
    ],
)
def test_a_bad_record_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        make(replace(GOOD, **changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_pages": 0}, "num_pages is 0"),
        ({"page_size": 0}, "page_size is 0"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"max_batch": 0}, "max_batch is 0, but there are 1 groups"),
        ({"max_batch": 2, "num_groups": 3}, "max_batch is 2, but there are 3 groups"),
        ({"max_step_tokens": 3}, "max_step_tokens is 3, but 4 sequences of a group"),
        ({"max_batch": 5, "max_step_tokens": 2, "num_groups": 2}, "max_step_tokens is 2, but 3 sequences"),
    ],
)
def test_a_bad_limit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        make(GOOD, **changed)


def test_a_step_may_hold_just_the_share_of_a_group():
    make(GOOD, max_batch=5, max_step_tokens=3, num_groups=2)


def test_a_queue_without_requests_is_finished():
    queue = GenerationQueue([], **LIMITS)
    assert queue.is_finished
    assert queue.next(0) is None
    assert queue.statistics.num_skips == 0
    queue.close()
