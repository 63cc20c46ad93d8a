"""Reads parquet files, a few rows at a time, with file and row in every error."""

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
from glm_rlhf.parallel.storage.text_files import first_duplicate

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_ROWS_AT_ONCE = 256
"""Rows decoded to Python objects at a time."""
_MARK = b"PAR1"

_log = logging.getLogger(__name__)


def read_parquet_rows(
    path: str | Path,
    parse: Callable[[dict, RecordLocation], Record],
    *,
    on_error: OnError = "raise",
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Return an iterator over a file's records, one object per row, reading row groups in order.

    A row becomes the object that the same record has in JSON: columns are its fields, lists and structs nest.
    A row has all columns, so null means "not set": such fields are dropped from the record and from structs
    in it. Null in a list is kept. NaN or Inf makes a bad record.

    Columns of a type that JSON lacks (bytes, dates, decimals, maps) are not read; one warning names them.

    A file that cannot be read at all (missing, a folder, empty, not parquet, truncated, without a readable
    column) is an error for any `on_error`, raised by the call itself. So are, during iteration, a damaged row
    group and a file without a valid record.

    Args:
        path: the file.
        parse: returns the record of an object, or raises `RecordError` (see `RecordLocation.error`).
        on_error: `raise` at the first bad row, or `skip` bad rows, see `parse_records`.
        report: filled while reading; a new one for each file.

    Raises:
        RecordError: as above, or pyarrow is not installed. ValueError: an unknown `on_error`.
    """
    check_on_error(on_error)
    path = Path(path)
    with _open(path) as file:
        columns, excluded = _columns(file.schema_arrow, path)
    if excluded:
        _log.warning("%s: %s not read: JSON has no such type", path, f"column {', '.join(excluded)} is")

    def parse_row(row: dict | ValueError, location: RecordLocation) -> Record:
        if isinstance(row, ValueError):
            raise location.error(f"not usable: {row}") from row
        try:
            fields = _without_nulls(row)
        except ValueError as error:
            raise location.error(str(error)) from error
        return parse(fields, location)

    return parse_records(
        path,
        _rows(path, columns),
        parse_row,
        on_error=on_error,
        report=ReadReport() if report is None else report,
        blank="it has no row",
    )


def check_parquet(path: Path) -> None:
    """Check that a file can be read as parquet, as far as its beginning and end show.

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
        raise RecordError(
            path, 0, f"is damaged or truncated: {_first_line(error)}; download it again"
        ) from error


def _columns(schema: "pyarrow.Schema", path: Path) -> tuple[list[str], list[str]]:
    """Return the names of the readable columns, and `'name' (type)` of the others."""
    readable = {field.name: _is_json(field.type) for field in schema}
    if len(readable) < len(schema):
        duplicate = first_duplicate(schema.names)
        raise RecordError(path, 0, f"has two columns named {duplicate!r}; rename one")
    excluded = [f"{name!r} ({schema.field(name).type})" for name, reads in readable.items() if not reads]
    if len(excluded) == len(readable):
        columns = ", ".join(excluded) or "none"
        raise RecordError(path, 0, f"has no column of texts, numbers, lists or structs; it has {columns}")
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
    """Yield `(row number, columns)`; an error instead of the columns where they cannot be decoded."""
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
            reason = f"the file cannot be read beyond this row: {_first_line(error)}; download it again"
            raise RecordError(path, number + 1, reason) from error


def _decoded(batch: "pyarrow.RecordBatch") -> list[dict | ValueError]:
    try:
        return batch.to_pylist()
    except ValueError as error:  # a text is not UTF-8: find its row
        if batch.num_rows == 1:
            return [error]
        half = batch.num_rows // 2
        return _decoded(batch.slice(0, half)) + _decoded(batch.slice(half))


def _without_nulls(value: object) -> object:
    """Return a value without the nulls in its objects, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value} is not JSON; write null instead")
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
