"""Collectives end in `Work.wait`, and the context around it is gone with the block."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat.timed_waits import around_waits

WAIT = Upstream(patch="timed_waits.around_waits", symbol="torch.distributed:Work.wait")
KINDS = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(())),
    "async": lambda: dist.all_reduce(torch.ones(()), async_op=True).wait(),
    "objects": lambda: dist.all_gather_object([None], 1),
    "barrier": dist.barrier,
    "broadcast": lambda: dist.broadcast(torch.ones(()), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_communication_waits_in_the_context(topology, kind):
    events = []

    @contextlib.contextmanager
    def noted():
        events.append("begin")
        yield
        events.append("end")

    with around_waits(noted):
        KINDS[kind]()
    assert events, moved(WAIT, f"is not what a {kind} ends in")
    assert events == ["begin", "end"] * (len(events) // 2)
    num_events = len(events)
    KINDS[kind]()
    assert len(events) == num_events


def test_the_method_is_put_back_after_an_exception():
    original = dist.Work.wait
    with pytest.raises(ZeroDivisionError), around_waits(contextlib.nullcontext):
        raise ZeroDivisionError
    assert dist.Work.wait is original
