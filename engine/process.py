"""What the command line sets once in its process: escapes in its streams, repeats of a Ctrl-C."""

import signal
import sys
import time

_REPEAT_S = 2.0
"""Seconds from a Ctrl-C in which another one is the same: torchrun sends on what the terminal has sent."""


def write_any_character() -> None:
    """Make stdout and stderr escape what their encoding lacks, such as ASCII, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(
            stream, "reconfigure"
        ):
            stream.reconfigure(errors="backslashreplace")


def ignore_repeated_interrupts() -> None:
    """Raise KeyboardInterrupt for a Ctrl-C, but not for its repeats, for the rest of the process.

    Otherwise the second of two deliveries interrupts the report of the first. A SIGINT that is ignored, as in
    a background job of a shell, stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    last_s = -float("inf")

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal last_s
        now, before = time.monotonic(), last_s
        if now - before > _REPEAT_S:
            last_s = now
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
