"""Lines for the user on stderr, from the main rank or from one rank by its number. Imports no torch.

The logger `glm_rlhf` has one handler, which writes each message as it is to stderr. An application that
gives the logger a handler of its own before it imports this module keeps that one; otherwise handlers of the
root logger do not receive the messages.
"""

import logging
import sys
from typing import Protocol

ROOT = "glm_rlhf"
_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)  # whatever level the logger above it has


class Speaker(Protocol):
    """What a topology says of the rank that writes to the terminal."""

    @property
    def is_main_rank(self) -> bool:
        """Whether this rank writes."""


def log(message: str, topology: Speaker | None = None) -> None:
    """Write a message to stderr.

    Args:
        message: one line or several, without the last line end.
        topology: where given, only its main rank writes; every rank may call. None writes on each rank that
            calls.
    """
    if topology is None or topology.is_main_rank:
        _logger.info("%s", message)


def log_rank(message: str, rank: int) -> None:
    """Write a message to stderr as `[rank N] message`, on each rank that calls."""
    _logger.info("[rank %d] %s", rank, message)


class _StderrHandler(logging.Handler):
    """Writes to `sys.stderr` as it is at that moment: tests and applications replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


if not logging.getLogger(ROOT).handlers:
    logging.getLogger(ROOT).addHandler(_StderrHandler())
    logging.getLogger(ROOT).propagate = False  # a handler of the root logger would write each message again
