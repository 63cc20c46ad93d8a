"""Reads JSON-lines files, with file and line in every error."""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from glm_rlhf.engine.data.records.reading import (
    OnError,
    ReadReport,
    Record,
    RecordError,
    RecordLocation,
    check_on_error,
    file_head,
    parse_records,
)
from glm_rlhf.parallel.storage.text_files import MAX_DEPTH, first_duplicate, is_deeper_than

DEFAULT_MAX_LINE_BYTES = 16 * 2**20
"""A longer line (16 MiB, uncompressed) is an error, and is never fully read into memory."""

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MARK = b"\x1f\x8b"
_PARQUET_MARK = b"PAR1"


def read_json_lines(
    path: str | Path,
    parse: Callable[[dict, RecordLocation], Record],
    *,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Return an iterator over a file's records, one JSON object per line, read lazily.

    Format: UTF-8 (a byte order mark at the start is skipped), lines ended by LF or CRLF, blank lines skipped
    and counted, `.gz` decompressed. JSON is strict: no `NaN` or `Infinity`, no number outside the range of a
    float, no duplicate key, no raw control character. A last line without a line break is read; if it is not
    JSON, the error says that the file seems to be truncated.

    A file that cannot be read at all (missing, a folder, empty, UTF-16, gzip under a name without `.gz` or
    the reverse) is an error for any `on_error`, raised by the call itself. So are, during iteration, a
    truncated gzip stream and a file without a valid record.

    Args:
        path: the file.
        parse: returns the record of an object, or raises `RecordError` (see `RecordLocation.error`).
        on_error: `raise` at the first bad line, or `skip` bad lines: they are counted in `report`, and a
            warning with the count and the first error is logged at the end of the file.
        max_line_bytes: longest line in bytes, without its line break.
        report: filled while reading; a new one for each file.

    Raises:
        RecordError: as above. ValueError: an unknown `on_error`, a `max_line_bytes` below 1.
    """
    check_on_error(on_error)
    if max_line_bytes < 1:
        raise ValueError(f"max_line_bytes is {max_line_bytes}; it must be at least 1")
    path = Path(path)
    check_file(path)

    def parse_line(line: tuple[bytes, bool], location: RecordLocation) -> Record:
        content, is_too_long = line
        if is_too_long:
            raise location.error(
                f"the line is longer than {max_line_bytes} bytes; split it, or raise max_line_bytes"
            )
        return parse(_parse_object(content, location), location)

    return parse_records(
        path,
        _lines(path, max_line_bytes),
        parse_line,
        on_error=on_error,
        report=ReadReport() if report is None else report,
        blank="every line is blank",
    )


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, tuple[bytes, bool] | None]]:
    """Yield `(line number, (content, is_too_long))`; None instead of the pair for a blank line.

    Of a line that is too long only the beginning is kept.
    """
    limit = max_line_bytes + 2  # with CR LF, so that a line of exactly the limit is read with its end
    with _open(path) as file:
        number = 0
        while True:
            try:
                content = file.readline(limit)
                is_ended = content.endswith(b"\n") or len(content) < limit
                is_too_long = not is_ended or len(content.rstrip(b"\r\n")) > max_line_bytes
                while not is_ended:
                    rest = file.readline(2**16)
                    is_ended = rest.endswith(b"\n") or not rest
            except (OSError, EOFError, zlib.error) as error:
                reason = f"the file cannot be read beyond this line: {error}; download it again"
                raise RecordError(path, number + 1, reason) from error
            if not content:
                return
            number += 1
            content = content.removeprefix(_UTF8_MARK) if number == 1 else content
            is_blank = not is_too_long and not content.strip()
            yield number, None if is_blank else (content, is_too_long)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def check_file(path: Path) -> None:
    """Check that a file can be read as JSON lines, as far as its beginning shows.

    Raises:
        RecordError: it is missing, empty, a folder, UTF-16 or parquet, or its compression does not match its
            name.
    """
    head = file_head(path)
    if head == _PARQUET_MARK:
        raise RecordError(path, 0, f"is parquet; rename it to {path.stem}.parquet")
    is_gzip, is_named_gzip = head.startswith(_GZIP_MARK), path.suffix == ".gz"
    if is_gzip and not is_named_gzip:
        raise RecordError(path, 0, f"is gzip; rename it to {path.name}.gz, or unpack it with gunzip")
    if is_named_gzip and not is_gzip:
        raise RecordError(path, 0, "is not gzip; remove .gz from its name, or pack it with gzip")
    zeros = [byte == 0 for byte in head]
    if head.startswith(_UTF16_MARKS) or zeros in ([True, False] * 2, [False, True] * 2):
        raise RecordError(path, 0, "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")


def _parse_object(content: bytes, location: RecordLocation) -> dict:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise location.error(
            f"invalid UTF-8 at byte {error.start} of the line; convert the file to UTF-8"
        ) from error
    if "\0" in text:
        raise location.error(
            f"a NUL character at column {text.index(chr(0)) + 1}; the file is damaged or binary"
        )
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        is_cut_off = not content.endswith(b"\n")
        tail = " (the last line, without a line break: the file seems truncated)" if is_cut_off else ""
        problem = error.msg.removesuffix(" at")  # some of Python's messages end with "at"
        is_object = text.strip().startswith("{") and text.strip() != "{"
        form = "" if is_object else "; each line must be one JSON object"
        raise location.error(f"not JSON: {problem} at column {error.colno}{tail}{form}") from error
    except RecursionError as error:
        raise location.error("not usable: the JSON is nested too deeply") from error
    except ValueError as error:
        raise location.error(f"not usable: {error}") from error
    if not isinstance(value, dict):
        hint = "; write the list's items one per line" if isinstance(value, list) else ""
        raise location.error(f"expected a JSON object, found {json_type(value)}{hint}")
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deeper_than(value, MAX_DEPTH):
        raise location.error(f"not usable: the JSON is nested too deeply, over {MAX_DEPTH} levels")
    return value


def json_type(value: object) -> str:
    """Return the name of a parsed value's JSON type: `null`, `a number`, `a list`, …"""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return {str: "a text", list: "a list", dict: "an object"}[type(value)]


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        duplicate = first_duplicate(key for key, _ in pairs)
        raise ValueError(f"the key {duplicate!r:.100} is in one object twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write null, or omit the field")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is outside the range of a float")
    return value
