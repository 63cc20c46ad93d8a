"""Which rank reports an exception that several ranks raise. Imports no torch."""

from typing import TypeVar

Failure = TypeVar("Failure", bound=BaseException)


def reported_by(rank: int, error: Failure) -> Failure:
    """Return an exception, marked as one that a rank reports to the user: the others need not."""
    error.__dict__["reporting_rank"] = rank
    return error


def reporting_rank(error: BaseException) -> int | None:
    """Return the rank that reports an exception to the user; None: each rank that raises it."""
    return error.__dict__.get("reporting_rank")
