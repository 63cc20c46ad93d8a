"""A fault that one rank finds ends every rank alike, instead of leaving the others to wait for it."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def agreed(work: str, *, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block whose `ValueError` or `OSError` on any rank is raised on all of them.

    The block itself must not communicate. At its end one small all-gather of `group` (the world when
    None) compares notes, so every rank of the group must come there.

    Args:
        work: what the block does, for the message of the ranks that found nothing wrong.
        group: who has to agree.

    Raises:
        ValueError: this rank's own fault, or the first rank's that has one, in its words.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as found:
        error = found
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    faults: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(faults, None if error is None else str(error), group=group)
    if error is not None:
        raise error
    for rank, fault in enumerate(faults):
        if fault is not None:
            raise ValueError(f"{work} failed on rank {rank}: {fault}")
