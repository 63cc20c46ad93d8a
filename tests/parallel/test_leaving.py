"""A signal to one rank is a wish that all ranks see at the same place, and only while it is heeded."""

import os
import signal

import torch
import torch.distributed as dist

from glm_rlhf.parallel.leaving import heeding_signals, is_wished, postponed


def wishes_seen(number: int) -> list[bool]:
    world = (None, torch.device("cpu"))
    seen, before = [is_wished(world)], signal.getsignal(number)
    with heeding_signals():
        seen.append(is_wished(world))
        if dist.get_rank() == 2:
            os.kill(os.getpid(), number)
        with postponed():
            seen.append(is_wished(world))
        seen.append(is_wished(world))
    seen.append(is_wished(world))
    assert signal.getsignal(number) == before
    return seen


def test_all_ranks_see_the_wish_of_one_while_it_is_heeded(ranks):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        assert ranks.run(wishes_seen, number) == [[False, False, False, True, False]] * 4
