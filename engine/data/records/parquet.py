"""Parquet files, read a few rows at a time, with the file and the row in every error."""

import logging
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_ROWS_AT_ONCE = 256
"""Rows that are Python objects at a time."""
_MARK = b"PAR1"

_log = logging.getLogger(__name__)


def read_parquet_rows(
    path: str | Path,
    parse: Callable[[dict, RecordLocation], Record],
    *,
    on_error: OnError = "raise",
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Return an iterator over a file's records, one object a row, row groups read in turn.

    A row becomes the object that the same record has in JSON: columns are its fields, lists and structs nest.
    A row of a table has every column, so that null can only mean "not given": such a field is left out, of
    the record and of a struct in it. A null in a list stays. A float that is not finite makes a bad record.

    Columns of a type that JSON has no form for (bytes, dates, decimals, maps) are not read, and named once
    in a warning.

    A file that cannot be read as a whole (missing, a folder, empty, no parquet or cut off, without a column
    that can be read) is always an error, whatever `on_error` says, and noticed by the call itself. So are,
    while iterating, a row group that is damaged and a file from which no record is left.

    Args:
        path: the file.
        parse: makes a record of an object, or raises `RecordError` (see `Place.error`).
        on_error: `raise` at the first bad row, or `skip` it, as `parse_records` says.
        report: filled while reading; a new one for each file.

    Raises:
        RecordError: as above, or pyarrow is not installed. ValueError: an unknown `on_error`.
    """
    check_on_error(on_error)
    path = Path(path)
    with _open(path) as file:
        columns, excluded = _columns(file.schema_arrow, path)
    if excluded:
        _log.warning(
            "%s: %s not read: JSON has no form for the type", path, f"column {', '.join(excluded)} is"
        )

    def parse_row(row: dict | ValueError, place: RecordLocation) -> Record:
        if isinstance(row, ValueError):
            raise place.error(f"not usable: {row}") from row
        try:
            fields = _without_nulls(row)
        except ValueError as error:
            raise place.error(str(error)) from error
        return parse(fields, place)

    return parse_records(
        path,
        _rows(path, columns),
        parse_row,
        on_error=on_error,
        report=ReadReport() if report is None else report,
        blank="it has no row",
    )


def check_parquet(path: Path) -> None:
    """Return nothing when a file can be read as parquet, as far as its beginning and its end tell.

    Raises:
        RecordError: see `read_parquet_rows`.
    """
    with _open(path) as file:
        _columns(file.schema_arrow, path)


def _open(path: Path) -> "parquet.ParquetFile":
    if file_head(path) != _MARK:
        raise RecordError(path, 0, "is not parquet; a file of JSON lines is named .jsonl or .jsonl.gz")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise RecordError(
            path,
            0,
            "is parquet, which needs pyarrow: pip install 'glm-rlhf[parquet]'",
        ) from error
    try:
        return parquet.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
    except (OSError, ValueError, NotImplementedError) as error:
        raise RecordError(path, 0, f"is damaged or cut off: {_first_line(error)}; fetch it again") from error


def _columns(schema: "pyarrow.Schema", path: Path) -> tuple[list[str], list[str]]:
    """Return the names of the columns that are read, and `'name' (type)` of the others."""
    readable = {field.name: _is_json(field.type) for field in schema}
    if len(readable) < len(schema):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise RecordError(path, 0, f"has two columns named {twice!r}; rename one")
    excluded = [f"{name!r} ({schema.field(name).type})" for name, reads in readable.items() if not reads]
    if len(excluded) == len(readable):
        found = ", ".join(excluded) or "none"
        raise RecordError(path, 0, f"has no column of texts, numbers, lists or structs; it has {found}")
    return [name for name, reads in readable.items() if reads], excluded


def _is_json(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(i).type) for i in range(kind.num_fields))
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_float32(kind) or types.is_float64(kind)
    return is_text or is_number or types.is_boolean(kind) or types.is_null(kind)


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield `(row number, its columns)`, in place of the columns an error where they cannot be decoded."""
    number = 0
    with _open(path) as file:
        try:
            for group in range(file.num_row_groups):
                batches = file.iter_batches(
                    _ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False
                )
                for row in chain.from_iterable(map(_decoded, batches)):
                    number += 1
                    yield number, row
        except (OSError, ValueError, NotImplementedError) as error:
            reason = f"the file cannot be read on from here: {_first_line(error)}; fetch it again"
            raise RecordError(path, number + 1, reason) from error


def _decoded(batch: "pyarrow.RecordBatch") -> list[dict | ValueError]:
    try:
        return batch.to_pylist()
    except ValueError as error:  # a text that is no UTF-8: find whose it is
        if batch.num_rows == 1:
            return [error]
        half = batch.num_rows // 2
        return _decoded(batch.slice(0, half)) + _decoded(batch.slice(half))


def _without_nulls(value: object) -> object:
    """Return a value with the nulls of its objects taken out, at every depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value} is no JSON; give null in its place")
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
