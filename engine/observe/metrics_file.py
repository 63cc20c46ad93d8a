"""`metrics.jsonl` as it is found: lines of steps, and others that no run of this program wrote."""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

FILE_NAME = "metrics.jsonl"
_MAX_LINE_BYTES = 2**22


def read_metrics(path: Path) -> tuple[dict[int, dict[str, Any]], int]:
    """Return the lines of a metrics file by step, ascending, and the number of others.

    A line is a JSON object with a step, a whole number from 0, and a finite number or null for each other
    name. Of a repeated step the last line counts. Others are blank, cut by a kill or a full disk, or foreign.

    Raises:
        ValueError: it is not a regular file.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}, 0
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: remove it")
    by_step, num_others = {}, 0
    for line in _lines(path):
        values = _parsed(line)
        if values is None:
            num_others += 1
        else:
            by_step[values["step"]] = values
    return dict(sorted(by_step.items())), num_others


def has_metrics(run_folder: str | Path) -> bool:
    """Return whether a run folder has a metrics file with something in it."""
    with contextlib.suppress(OSError):
        found = os.stat(Path(run_folder) / FILE_NAME)
        return stat.S_ISREG(found.st_mode) and found.st_size > 0
    return False


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines; of one that is too long its first part, which is no line of a step."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            yield line
            while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE_BYTES)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    step = values.get("step")
    if type(step) is not int or step < 0 or not all(map(_is_number, values.values())):
        return None
    return values


def _is_number(value: object) -> bool:
    if value is None or type(value) not in (int, float):
        return value is None
    try:
        return math.isfinite(cast(float, value))
    except OverflowError:  # a whole number beyond any float
        return False
