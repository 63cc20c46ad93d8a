"""Reads text and JSON files that anybody may have made: regular, UTF-8, bounded in size and depth.

A byte order mark at the start, as editors on Windows write it, is skipped.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glm_rlhf.parallel.storage.model_folder import ModelFolderError

MAX_TEXT_BYTES = 64 * 2**20
"""Largest text file: the index of the largest models has less than one MiB."""
MAX_DEPTH = 64
"""Most levels of lists and objects in a JSON text: no file of a model has ten."""


def read_regular(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a regular file; a pipe, a device or a folder is refused, and never waited for.

    Raises:
        ModelFolderError: it is another kind of file, larger than `max_bytes`, or cannot be read.
    """
    try:
        # A pipe that nobody writes to would block: it is opened without waiting and looked at first.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ModelFolderError(f"{path} is not a regular file; write its content to a file first")
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > max_bytes:
        raise ModelFolderError(f"{path} is larger than {max_bytes} bytes, which no such file is")
    return content


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        ModelFolderError: as `read_regular`, or it is not UTF-8.
    """
    try:
        return read_regular(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"{path} is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, allows_nonfinite: bool = False) -> dict:
    """Return the JSON object in `path`; arguments as for `read_text` and `parse_json_object`.

    Raises:
        ModelFolderError: as `read_text` and `parse_json_object`; the message gives the line.
    """
    text = read_text(path, max_bytes=max_bytes)
    return parse_json_object(text, what=str(path), allows_nonfinite=allows_nonfinite)


def parse_json_object(text: str, *, what: str, allows_nonfinite: bool = False) -> dict:
    """Return `text` as a dict.

    Args:
        text: JSON.
        what: names it in messages.
        allows_nonfinite: accept `NaN` and `Infinity`, which Python writes; otherwise they are refused,
            because no other reader takes them.

    Raises:
        ModelFolderError: not JSON, nested too deeply, a duplicate key, a number that is not finite, a lone
            surrogate, or not an object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ModelFolderError(f"{what} is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ModelFolderError(f"{what} is not usable JSON: {_TOO_DEEP}") from None
    except ValueError as error:
        raise ModelFolderError(f"{what} is not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{what} holds a {type(value).__name__} at the top; a JSON object is required")
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deeper_than(value, MAX_DEPTH):
        raise ModelFolderError(f"{what} is not usable JSON: {_TOO_DEEP}")
    if not allows_nonfinite and (found := _nonfinite_in(value)):
        raise ModelFolderError(f"{what}: {found}; a finite number is required")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ModelFolderError(f"{what} holds a lone surrogate; fix its \\u escape") from None
    return value


_TOO_DEEP = f"it nests more than {MAX_DEPTH} levels deep"


def is_deeper_than(value: object, max_depth: int) -> bool:
    """Return whether a parsed JSON value nests more than `max_depth` lists and objects."""
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def first_duplicate(names: Iterable[str]) -> str | None:
    """Return the first of the names that was there before; None if all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = first_duplicate(name for name, _ in pairs)
        raise ValueError(f"the key {twice!r:.100} stands there twice")
    return result


def _nonfinite_in(value: dict) -> str | None:
    """Return `key is nan` of the first number of an object, at any depth, that is not finite."""
    waiting: list[tuple[str, object]] = list(value.items())
    while waiting:
        key, inner = waiting.pop()
        if isinstance(inner, dict):
            waiting += ((f"{key}.{name}", deeper) for name, deeper in inner.items())
        elif isinstance(inner, list):
            waiting += ((key, deeper) for deeper in inner)
        elif isinstance(inner, float) and not math.isfinite(inner):
            return f"{key} is {inner}"
    return None
