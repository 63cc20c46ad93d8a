"""A signal to one rank is a preemption request that all ranks see at the same step, while handled."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from glm_rlhf.parallel.runtime.preemption import (
    defer_preemption,
    handle_preemption_signals,
    preemption_requested,
    restore_handlers,
)


def requests_seen(number: int) -> list[bool]:
    world = (None, torch.device("cpu"))
    seen, before = [preemption_requested(world)], signal.getsignal(number)
    with handle_preemption_signals():
        seen.append(preemption_requested(world))
        if dist.get_rank() == 2:
            os.kill(os.getpid(), number)
        with defer_preemption():
            seen.append(preemption_requested(world))
        seen.append(preemption_requested(world))
    seen.append(preemption_requested(world))
    assert signal.getsignal(number) == before
    return seen


def test_all_ranks_see_a_request_to_one_while_signals_are_handled(ranks):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        assert ranks.run(requests_seen, number) == [[False, False, False, True, False]] * 4


def test_a_failed_rank_survives_one_signal_until_it_has_reported():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="lost"), handle_preemption_signals():
        raise RuntimeError("a peer is lost")
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before  # the second one ends the process
    restore_handlers()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_handlers_do_not_accumulate_over_blocks_that_raise():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    for _ in range(3):
        with pytest.raises(RuntimeError), handle_preemption_signals():
            raise RuntimeError
    restore_handlers()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
