"""Files of records of every form, told apart by their names."""

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

    `max_line_bytes` bounds a line of JSON; parquet has none. The other arguments are the same for both.

    Raises:
        RecordError, ValueError: as the two.
    """
    if _is_parquet(path):
        return read_parquet_rows(path, parse, on_error=on_error, report=report)
    return read_json_lines(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def check_record_file(path: Path) -> None:
    """Return nothing when a file can be read, as far as its beginning, and of parquet its end, tell.

    Raises:
        RecordError: as `read_record_file` at once.
    """
    if _is_parquet(path):
        check_parquet(path)
    else:
        check_file(path)


def _is_parquet(path: str | Path) -> bool:
    return Path(path).suffix == ".parquet"
