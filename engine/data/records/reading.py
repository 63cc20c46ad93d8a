"""What every reader of record files shares: places, errors, the report, and what a bad record does."""

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
    """A data file or a record of it that cannot be used."""

    def __init__(self, path: str | Path, line: int, reason: str) -> None:
        """Keep the place: `line`, or row of a table, counts from 1; 0 stands for the file as a whole."""
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
    """Blank lines, which are no records and no errors; a table has none."""
    errors: list[RecordError] = field(default_factory=list)
    """The first 20 errors skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLocation:
    """Where a record stands."""

    path: Path
    """The file."""
    line: int
    """Its line, from 1, blank lines counted; of a table its row, from 1."""
    index: int
    """Its place among the file's records, from 0; blank lines do not count, skipped records do."""

    def error(self, reason: str) -> RecordError:
        """Return the error that something is wrong here."""
        return RecordError(self.path, self.line, reason)


def check_on_error(on_error: str) -> None:
    """Return nothing for `raise` and `skip`.

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
    """Return an iterator over what `parse` makes of a file's records, bad ones raised or left out.

    Args:
        path: the file, for errors.
        raw_records: `(line or row from 1, what stands there)`; None is a blank line.
        parse: makes a record, or raises `RecordError`.
        on_error: `raise` at the first bad record, or `skip` it: counted in `report`, and logged as a warning
            with the count and the first error when the file is through.
        report: filled while reading.
        blank: said of a file that holds no record at all, not even a bad one.

    Raises:
        RecordError: a bad record; a file from which none is left, whatever `on_error` says.
    """
    index = 0
    for line, raw in raw_records:
        if raw is None:
            report.num_blank += 1
            continue
        place = RecordLocation(path=path, line=line, index=index)
        index += 1
        try:
            record = parse(raw, place)
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
        RecordError: it is missing, a folder, no regular file, or empty.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside = sorted(p.name for p in path.iterdir() if {".jsonl", ".parquet"} & set(p.suffixes))[:3]
            hint = f", such as {', '.join(inside)} in it" if inside else ""
            raise RecordError(path, 0, f"is a folder; give a file of records{hint}")
        if not stat.S_ISREG(mode):
            raise RecordError(path, 0, "is no regular file; write the records to a file first")
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise RecordError(path, 0, f"cannot be read: {error.strerror or error}") from error
    if not head:
        raise RecordError(path, 0, "is empty; it must hold one record or more")
    return head
