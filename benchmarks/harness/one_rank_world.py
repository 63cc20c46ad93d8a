"""A world in which one process plays one rank, and whose collectives and messages do nothing."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextlib.contextmanager
def world_of_one_rank(rank: int, world_size: int) -> Iterator[None]:
    """Inside, this process is `rank` of `world_size`; messages of others hold whatever is in memory.

    No world may exist in the process before.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
