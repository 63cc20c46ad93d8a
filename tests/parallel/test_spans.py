"""Spans and waits: told while there is a recorder, and not otherwise."""

import time

import pytest
import torch
import torch.distributed as dist

from glm_rlhf.parallel.layout import Layout
from glm_rlhf.parallel.spans import WAIT, is_recording, recording, span
from glm_rlhf.parallel.topology import topology


def test_spans_are_told_in_the_order_in_which_they_end():
    told = []
    with recording(lambda *event: told.append(event)):
        assert is_recording()
        with span("outer"):
            with span("inner"):
                time.sleep(0.01)
    assert not is_recording()
    (inner, inner_start, inner_end), (outer, outer_start, outer_end) = told
    assert (inner, outer) == ("inner", "outer")
    assert outer_start <= inner_start < inner_end <= outer_end
    assert inner_end - inner_start >= 0.01
    with span("after"):
        pass
    assert len(told) == 2


def test_one_recorder_at_a_time_and_none_is_left_behind():
    wait = dist.Work.wait
    with recording(print):
        assert dist.Work.wait is not wait
        with pytest.raises(RuntimeError, match="one recorder"):
            recording(print).__enter__()
    assert dist.Work.wait is wait
    with pytest.raises(ZeroDivisionError), recording(print):
        raise ZeroDivisionError
    assert dist.Work.wait is wait
    assert not is_recording()


def test_every_kind_of_communication_ends_in_a_wait_that_is_seen():
    ones, told = torch.ones(4), []
    kinds = (
        lambda: dist.all_reduce(ones),
        lambda: dist.all_gather_object([None], 3),
        lambda: dist.all_reduce(ones, async_op=True).wait(),
        dist.barrier,
    )
    with topology(Layout()), recording(lambda *event: told.append(event[0])):
        for number, communicate in enumerate(kinds, start=1):
            communicate()
            assert told.count(WAIT) >= number
