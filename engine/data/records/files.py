"""Reads record files; the format follows from the file's name."""

from collections.abc import Callable, Iterator
from pathlib import Path

from glm_rlhf.engine.data.records.jsonl import DEFAULT_MAX_LINE_BYTES, check_file, read_json_lines
from glm_rlhf.engine.data.records.parquet import check_parquet, read_parquet_rows
from glm_rlhf.engine.data.records.reading import OnError, ReadReport, Record, RecordLocation


def read_record_file(
    path: str | Path,
    parse: Callable[[dict, RecordLocation], Record],
    *,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Return an iterator over a file's records: `.parquet` by `read_parquet_rows`, else `read_json_lines`.

    `max_line_bytes` limits a line of JSON; parquet has no such limit. The other arguments are the same for
    both.

    Raises:
        RecordError, ValueError: as both.
    """
    if _is_parquet(path):
        return read_parquet_rows(path, parse, on_error=on_error, report=report)
    return read_json_lines(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def check_record_file(path: Path) -> None:
    """Check that a file can be read, as far as its beginning and the end of a parquet file show.

    Raises:
        RecordError: as `read_record_file` when called.
    """
    if _is_parquet(path):
        check_parquet(path)
    else:
        check_file(path)


def _is_parquet(path: str | Path) -> bool:
    return Path(path).suffix == ".parquet"
