"""Exceptions of one rank are raised on all ranks, so that no rank waits for one that has failed."""

import contextlib
from collections.abc import Callable, Iterator

import torch.distributed as dist

from glm_rlhf.parallel.runtime.reporter import reported_by, reporting_rank


@contextlib.contextmanager
def raise_on_all_ranks(work: str, *, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block whose exception on any rank is raised on all of them, and reported by the lowest of them.

    The block itself must not communicate. At its end all ranks of `group` (the world when None) take part in
    one small all-gather.

    Args:
        work: what the block does, for the message on ranks without an exception.
        group: the ranks that run the block.

    Raises:
        Exception: this rank's own, unchanged.
        ValueError: on ranks without an exception; the lowest failed rank's is a ValueError or OSError.
        RuntimeError: on ranks without an exception; the lowest failed rank's is of another type.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    failures: list[tuple[bool, str] | None] = [None] * dist.get_world_size(group)
    own = None if error is None else _describe(error)
    dist.all_gather_object(failures, own, group=group)
    for rank, failure in enumerate(failures):
        if failure is None:
            continue
        reporter = rank if group is None else dist.get_global_rank(group, rank)
        if error is None:
            is_user_error, message = failure
            error = (ValueError if is_user_error else RuntimeError)(
                f"{work} failed on rank {reporter}: {message}"
            )
        elif own != failure or reporter == dist.get_rank() or reporting_rank(error) is not None:
            raise error
        raise reported_by(reporter, error)


@contextlib.contextmanager
def failure_barriers(work: str, *, group: dist.ProcessGroup | None = None) -> Iterator[Callable[[], None]]:
    """Return, as a context manager, a barrier for a block in which ranks work independently.

    The exception of a rank is raised on the other ranks at their next barrier, or at the end of the block,
    which is a barrier too. All ranks of `group` call the barrier equally often and communicate in no other
    way.

    Args:
        work: what the block does, for the message on ranks without an exception.
        group: the ranks that run the block; the world when None.

    Raises:
        Exception: as `raise_on_all_ranks`, in the barrier or at the end.
    """
    has_failed_in_barrier = False

    def barrier() -> None:
        nonlocal has_failed_in_barrier
        has_failed_in_barrier = True
        with raise_on_all_ranks(work, group=group):
            pass
        has_failed_in_barrier = False

    error: Exception | None = None
    try:
        yield barrier
    except Exception as raised:
        error = raised
        if has_failed_in_barrier:  # all ranks have raised, or the barrier itself failed: none enters another
            raise
    with raise_on_all_ranks(work, group=group):
        if error is not None:
            raise error


def reason_of(error: Exception) -> str:
    """Return the message of a user's error; an OSError as `file: reason`, without its number."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _describe(error: Exception) -> tuple[bool, str]:
    """Return whether an exception is a user's error, and its message."""
    is_user_error = isinstance(error, ValueError | OSError)
    return is_user_error, reason_of(error) if is_user_error else f"{type(error).__name__}: {error}"
