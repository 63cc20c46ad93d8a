"""Spans and waits are recorded while there is a recorder."""

import time

import pytest
import torch
import torch.distributed as dist

from glm_rlhf.parallel.runtime.spans import WAIT, open_spans, phase_of, recording, span


def test_spans_are_recorded_in_the_order_in_which_they_end():
    recorded = []
    with recording(lambda *event: recorded.append(event)):
        with span("outer"):
            with span("inner"):
                time.sleep(0.01)
    (inner, inner_start, inner_end), (outer, outer_start, outer_end) = recorded
    assert (inner, outer) == ("inner", "outer")
    assert outer_start <= inner_start < inner_end <= outer_end
    assert inner_end - inner_start >= 0.01
    with span("after"):
        pass
    assert len(recorded) == 2


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


def wait_for_a_late_rank(late_s: float) -> dict[str, list[float]]:
    """On each rank: seconds of its waits for rank 0, late by `late_s`, in every kind of communication."""
    rank, ones = dist.get_rank(), torch.ones(4)
    kinds = {
        "all-reduce": lambda: dist.all_reduce(ones),
        "objects": lambda: dist.all_gather_object([None] * 4, rank),
        "later": lambda: dist.all_reduce(ones, async_op=True).wait(),
        "barrier": dist.barrier,
        "ring": lambda: [
            work.wait()
            for work in dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, ones, (rank + 1) % 4),
                    dist.P2POp(dist.irecv, torch.empty(4), (rank - 1) % 4),
                ]
            )
        ],
    }
    waited = {}
    for name, communicate in kinds.items():
        dist.barrier()
        recorded = []
        with recording(lambda *event, recorded=recorded: recorded.append(event)):
            if rank == 0:
                time.sleep(late_s)
            communicate()
        waited[name] = [end - start for what, start, end in recorded if what == WAIT]
    return waited


def test_waits_for_a_late_rank_are_seen_in_every_kind_of_communication(ranks):
    for late_s in (0.4, 2.0, 10.0):  # a busy machine may hold the others up as long: then again, longer
        late, waiting, *_ = ranks.run(wait_for_a_late_rank, late_s)  # rank 1 waits in the ring too
        if all(late_s / 4 < sum(waits) > sum(late[name]) for name, waits in waiting.items()):
            break
    for name, waits in waiting.items():
        assert sum(waits) > 0.1, name  # less than 0.4 s: this rank may come late itself
        assert sum(waits) > sum(late[name]), name


def test_an_exception_remembers_the_spans_that_it_was_raised_in():
    with pytest.raises(KeyError) as caught, span("update"), span("policy"):
        raise KeyError(open_spans())
    assert caught.value.args == (("update", "policy"),)
    assert phase_of(caught.value) == "update/policy"
    assert open_spans() == ()
    assert phase_of(KeyError()) == ""
