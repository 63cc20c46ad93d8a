"""JSON-lines files, read line by line, with the file and the line in every error."""

import gzip
import json
import logging
import math
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, TypeVar

OnError = Literal["raise", "skip"]
Record = TypeVar("Record")

DEFAULT_MAX_LINE_BYTES = 16 * 2**20
"""A line longer than this (16 MiB, uncompressed) is an error, and never wholly in memory."""

_NUM_KEPT_ERRORS = 20
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MARK = b"\x1f\x8b"

_log = logging.getLogger(__name__)


class RecordError(ValueError):
    """A data file or a line of it that cannot be used."""

    def __init__(self, path: str | Path, line: int, reason: str) -> None:
        """Keep the place: `line` counts from 1; 0 stands for the file as a whole."""
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path = Path(path)
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.line, self.reason)


@dataclass(slots=True, kw_only=True)
class ReadReport:
    """What became of a file's lines; filled while it is read, complete when the reader is exhausted."""

    num_records: int = 0
    """Records handed out."""
    num_skipped: int = 0
    """Lines left out because they were bad (`on_error="skip"`)."""
    num_blank: int = 0
    """Blank lines, which are no records and no errors."""
    errors: list[RecordError] = field(default_factory=list)
    """The first 20 errors skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a record stands."""

    path: Path
    """The file."""
    line: int
    """Its line, from 1; blank lines count."""
    index: int
    """Its place among the file's records, from 0; blank lines do not count, skipped records do."""

    def error(self, reason: str) -> RecordError:
        """Return the error that something is wrong here."""
        return RecordError(self.path, self.line, reason)


def read_json_lines(
    path: str | Path,
    parse: Callable[[dict, Place], Record],
    *,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Return an iterator over a file's records, one JSON object a line, read as it goes.

    The form: UTF-8 (a byte order mark at the start is passed over), lines ended by LF or CRLF, blank lines
    passed over and counted, `.gz` decompressed. JSON is strict: no `NaN` or `Infinity`, no number beyond a
    float's range, no key twice, no raw control character. A last line without a line end is read; where it is
    not JSON, the error says that the file seems cut off.

    A file that cannot be read as a whole (missing, a folder, empty, UTF-16, gzip under a name without `.gz`
    or the reverse) is always an error, whatever `on_error` says, and noticed by the call itself. So are,
    while iterating, a gzip stream that breaks off and a file from which no record is left.

    Args:
        path: the file.
        parse: makes a record of an object, or raises `RecordError` (see `Place.error`).
        on_error: `raise` at the first bad line, or `skip` it: counted in `report`, and logged as a warning
            with the count and the first error when the file is through.
        max_line_bytes: longest line accepted, in bytes, its end not counted.
        report: filled while reading; a new one for each file.

    Raises:
        RecordError: as above. ValueError: an unknown `on_error`, a `max_line_bytes` below 1.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error is {on_error!r}; it must be "raise" or "skip"')
    if max_line_bytes < 1:
        raise ValueError(f"max_line_bytes is {max_line_bytes}; it must be at least 1")
    path = Path(path)
    check_file(path)
    return _records(path, parse, on_error, max_line_bytes, ReadReport() if report is None else report)


def _records(
    path: Path,
    parse: Callable[[dict, Place], Record],
    on_error: OnError,
    max_line_bytes: int,
    report: ReadReport,
) -> Iterator[Record]:
    index = 0
    for line, content, is_too_long in _lines(path, max_line_bytes):
        if not content.strip() and not is_too_long:
            report.num_blank += 1
            continue
        place = Place(path=path, line=line, index=index)
        index += 1
        try:
            if is_too_long:
                raise place.error(
                    f"the line is longer than {max_line_bytes} bytes; split it, or raise max_line_bytes"
                )
            record = parse(_parse_object(content, place), place)
        except RecordError as error:
            if on_error == "raise":
                raise
            report.num_skipped += 1
            if len(report.errors) < _NUM_KEPT_ERRORS:
                report.errors.append(error)
            continue
        report.num_records += 1
        yield record
    _conclude(path, index, report)


def _conclude(path: Path, num_lines: int, report: ReadReport) -> None:
    if report.num_skipped:
        first = report.errors[0]
        _log.warning(
            "%s: skipped %d of %d records; the first: %s", path, report.num_skipped, num_lines, first
        )
    if not report.num_records:
        first = (
            f"all {num_lines} are bad; the first: {report.errors[0]}" if num_lines else "every line is blank"
        )
        raise RecordError(path, 0, f"no record is left: {first}")


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes, bool]]:
    """Yield `(line number, content, is_too_long)`; of a line over the limit only the beginning is kept."""
    limit = max_line_bytes + 2  # room for CR LF, so that a line of exactly the limit is read with its end
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
                reason = f"the file cannot be read on from here: {error}; fetch it again"
                raise RecordError(path, number + 1, reason) from error
            if not content:
                return
            number += 1
            yield number, content.removeprefix(_UTF8_MARK) if number == 1 else content, is_too_long


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def check_file(path: Path) -> None:
    """Return nothing when a file can be read as JSON lines, as far as its beginning tells.

    Raises:
        RecordError: it is missing, empty, a folder, UTF-16, or its name and its compression disagree.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside = sorted(p.name for p in path.iterdir() if ".jsonl" in p.suffixes)[:3]
            hint = f", such as {', '.join(inside)} in it" if inside else ""
            raise RecordError(path, 0, f"is a folder; give a JSON-lines file{hint}")
        if not stat.S_ISREG(mode):
            raise RecordError(path, 0, "is no regular file; write the records to a file first")
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise RecordError(path, 0, f"cannot be read: {error.strerror or error}") from error
    if not head:
        raise RecordError(path, 0, "is empty; it must hold one JSON object a line")
    is_gzip, is_named_gzip = head.startswith(_GZIP_MARK), path.suffix == ".gz"
    if is_gzip and not is_named_gzip:
        raise RecordError(path, 0, f"is gzip; name it {path.name}.gz, or unpack it with gunzip")
    if is_named_gzip and not is_gzip:
        raise RecordError(path, 0, "is not gzip; take the .gz from its name, or pack it with gzip")
    zeros = [byte == 0 for byte in head]
    if head.startswith(_UTF16_MARKS) or zeros in ([True, False] * 2, [False, True] * 2):
        raise RecordError(path, 0, "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")


def _parse_object(content: bytes, place: Place) -> dict:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise place.error(
            f"invalid UTF-8 at byte {error.start} of the line; convert the file to UTF-8"
        ) from error
    if "\0" in text:
        raise place.error(
            f"a NUL character at column {text.index(chr(0)) + 1}; the file is damaged or binary"
        )
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        is_cut_off = not content.endswith(b"\n")
        tail = " (the last line, without a line end: the file seems cut off)" if is_cut_off else ""
        what = error.msg.removesuffix(" at")  # some of Python's messages end so, for the column to follow
        raise place.error(f"not JSON: {what} at column {error.colno}{tail}") from error
    except RecursionError as error:
        raise place.error("not usable: the JSON is nested too deeply") from error
    except ValueError as error:
        raise place.error(f"not usable: {error}") from error
    if not isinstance(value, dict):
        hint = "; write a list's items one a line" if isinstance(value, list) else ""
        raise place.error(f"expected a JSON object, found {json_type(value)}{hint}")
    return value


def json_type(value: object) -> str:
    """Return what a parsed JSON value is called in JSON: `null`, `a number`, `a list`, …"""
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
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON; write null, or leave the field out")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is beyond a float's range")
    return value
