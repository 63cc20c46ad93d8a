"""Shared by all readers of record files: locations, errors, the report, and the handling of bad records."""

import logging
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

OnError = Literal["raise", "skip"]
Record = TypeVar("Record")
Raw = TypeVar("Raw")

_NUM_KEPT_ERRORS = 20

_log = logging.getLogger(__name__)


class RecordError(ValueError):
    """A data file, or a record of it, that cannot be used."""

    def __init__(self, path: str | Path, line: int, reason: str) -> None:
        """Keep path, line and reason; `line` (or row) counts from 1, and 0 means the whole file."""
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path = Path(path)
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.line, self.reason)


@dataclass(slots=True, kw_only=True)
class ReadReport:
    """Counts of a file's lines, filled while it is read and complete at its end."""

    num_records: int = 0
    """Records returned."""
    num_skipped: int = 0
    """Bad lines skipped (`on_error="skip"`)."""
    num_blank: int = 0
    """Blank lines, which are neither records nor errors; a parquet file has none."""
    errors: list[RecordError] = field(default_factory=list)
    """The first 20 errors of skipped lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLocation:
    """The location of a record."""

    path: Path
    """The file."""
    line: int
    """Line from 1, blank lines counted; in a parquet file the row, from 1."""
    index: int
    """Index among the file's records, from 0; skipped records count, blank lines do not."""

    def error(self, reason: str) -> RecordError:
        """Return a `RecordError` at this location."""
        return RecordError(self.path, self.line, reason)


def check_on_error(on_error: str) -> None:
    """Check that the value is `raise` or `skip`.

    Raises:
        ValueError: another value.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error is {on_error!r}; it must be "raise" or "skip"')


def parse_records(
    path: Path,
    raw_records: Iterable[tuple[int, Raw | None]],
    parse: Callable[[Raw, RecordLocation], Record],
    *,
    on_error: OnError,
    report: ReadReport,
    blank: str,
) -> Iterator[Record]:
    """Return an iterator over the parsed records of a file; bad ones are raised or skipped.

    Args:
        path: the file, for errors.
        raw_records: `(line or row from 1, raw record)`; None is a blank line.
        parse: returns the record of a raw one, or raises `RecordError`.
        on_error: `raise` at the first bad record, or `skip` bad ones: they are counted in `report`, and a
            warning with the count and the first error is logged at the end of the file.
        report: filled while reading.
        blank: reason in the error of a file that has no records, not even bad ones.

    Raises:
        RecordError: a bad record with `raise`; a file without a valid record for any `on_error`.
    """
    index = 0
    for line, raw in raw_records:
        if raw is None:
            report.num_blank += 1
            continue
        location = RecordLocation(path=path, line=line, index=index)
        index += 1
        try:
            record = parse(raw, location)
        except RecordError as error:
            if on_error == "raise":
                raise
            report.num_skipped += 1
            if len(report.errors) < _NUM_KEPT_ERRORS:
                report.errors.append(error)
            continue
        report.num_records += 1
        yield record
    if report.num_skipped:
        first = report.errors[0]
        _log.warning("%s: skipped %d of %d records; the first: %s", path, report.num_skipped, index, first)
    if not report.num_records:
        why = f"all {index} are bad; the first: {report.errors[0]}" if index else blank
        raise RecordError(path, 0, f"no record is left: {why}")


def file_head(path: Path) -> bytes:
    """Return a file's first 4 bytes.

    Raises:
        RecordError: it is missing, a folder, not a regular file, or empty.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside = sorted(p.name for p in path.iterdir() if {".jsonl", ".parquet"} & set(p.suffixes))[:3]
            hint = f", such as {', '.join(inside)} in it" if inside else ""
            raise RecordError(path, 0, f"is a folder; give a file of records{hint}")
        if not stat.S_ISREG(mode):
            raise RecordError(path, 0, "is not a regular file; write the records to a file first")
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise RecordError(path, 0, f"cannot be read: {error.strerror or error}") from error
    if not head:
        raise RecordError(path, 0, "is empty; it must hold at least one record")
    return head
