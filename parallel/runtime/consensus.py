"""A fault that one rank finds ends every rank alike, instead of leaving the others to wait for it."""

import contextlib
from collections.abc import Callable, Iterator

import torch.distributed as dist


@contextlib.contextmanager
def raise_on_all_ranks(work: str, *, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block whose exception on any rank is raised on all of them.

    The block itself must not communicate. At its end one small all-gather of `group` (the world when
    None) compares notes, so every rank of the group must come there.

    Args:
        work: what the block does, for the message of the ranks that found nothing wrong.
        group: who has to agree.

    Raises:
        Exception: this rank's own, as it is.
        ValueError: the first rank's that has one, in its words, where it is a ValueError or OSError.
        RuntimeError: the first rank's that has one, where it is of another kind.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    faults: list[tuple[bool, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(faults, None if error is None else _in_words(error), group=group)
    if error is not None:
        raise error
    for rank, fault in enumerate(faults):
        if fault is not None:
            is_users, words = fault
            raise (ValueError if is_users else RuntimeError)(f"{work} failed on rank {rank}: {words}")


@contextlib.contextmanager
def failure_barriers(work: str, *, group: dist.ProcessGroup | None = None) -> Iterator[Callable[[], None]]:
    """Return, as a context manager, a barrier for a block in which ranks work apart.

    A rank that fails between two barriers tells the others at their next one, or at the end of the block,
    where all meet once more. All ranks of `group` pass the barrier equally often and communicate in no
    other way.

    Args:
        work: what the block does, for the message of the ranks that found nothing wrong.
        group: who has to agree; the world when None.

    Raises:
        Exception: as `agreed`, in the barrier or at the end.
    """
    is_over = False

    def barrier() -> None:
        nonlocal is_over
        is_over = True
        with raise_on_all_ranks(work, group=group):
            pass
        is_over = False

    error: Exception | None = None
    try:
        yield barrier
    except Exception as found:
        error = found
        if is_over:  # another rank's fault, or the meeting itself failed: nobody comes any more
            raise
    with raise_on_all_ranks(work, group=group):
        if error is not None:
            raise error


def _in_words(error: Exception) -> tuple[bool, str]:
    """Return whether an exception is the user's to mend, and what it says."""
    is_users = isinstance(error, ValueError | OSError)
    return is_users, str(error) if is_users else f"{type(error).__name__}: {error}"
