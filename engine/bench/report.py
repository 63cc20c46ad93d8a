"""Rows of a benchmark as one Markdown file for people and one JSON file for programs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glm_rlhf.engine.bench.harness import Entry, Ratio, Timing
from glm_rlhf.parallel.storage.durable_io import replace_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One task at one shape, with the entries of its contenders."""

    row: str
    """Short name, unique in the report together with `shape`."""
    what: str
    """The task, and what is timed of it."""
    shape: str
    """Sizes and dtype."""
    command: str
    """Exact command that measures this row again."""
    entries: Sequence[Entry]
    """Contenders, ours first; empty where the row was not measured."""
    limit_s: float | None = None
    """Least time that the hardware allows, None where none is defined."""
    target_s: float | None = None
    """The goal of ours on the reference chip."""
    work: tuple[float, str] | None = None
    """The work of one run, such as (8192, "tokens"): adds a column of work per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A benchmark's results."""

    title: str
    claim: str
    """The claim about the figures, and the verdict."""
    machine: dict[str, str]
    """From `machine.description`."""
    rows: Sequence[Row]
    notes: Sequence[str] = ()


def write(report: Report, stem: Path) -> None:
    """Write `<stem>.md` and `<stem>.json`; what was not measured is null or missing there."""
    write_files(stem, as_markdown(report), asdict(report))


def write_files(stem: Path, markdown: str, content: Mapping[str, Any]) -> None:
    """Write `<stem>.md` for people and `<stem>.json` for programs; the folder is made where it is missing."""
    replace_text(stem.with_suffix(".md"), markdown)
    replace_text(stem.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def facts(machine: Mapping[str, str]) -> list[str]:
    """Return the machine's description as items of a Markdown list."""
    return [f"- {name}: {text}" for name, text in machine.items()]


def as_markdown(report: Report) -> str:
    """Return the report as one table with a line per contender, and the commands below it."""
    lines = [f"# {report.title}", "", report.claim, ""]
    lines += [*facts(report.machine), *(f"- {note}" for note in report.notes), ""]
    columns = _columns(report.rows)
    entries = ((row, entry) for row in report.rows for entry in row.entries or [Entry(name="")])
    lines += table(columns, (_cells(row, entry, columns) for row, entry in entries))
    lines += [
        "",
        "Median of the runs, with the quartiles between which half of them lie. `share of limit` is limit ÷ "
        "median; `ours is … × as fast` is the contender's median ÷ ours, from the same run, `quartiles ×` "
        "are those of the quotients turn by turn; `error` is the distance from the definition on the same "
        "inputs. An empty cell was not measured.",
        "",
        "Commands:",
        "",
    ]
    commands = dict.fromkeys(row.command for row in report.rows)
    lines += [f"- `{command}`" for command in commands]
    return "\n".join(lines) + "\n"


def joined(first: Row, again: Row) -> Row:
    """Return a row that was measured twice as one: mean of the medians by runs, the wider range, all runs.

    A contender that was not timed in either visit is reported so.
    """
    entries = []
    for before, after in zip(first.entries, again.entries, strict=True):
        if before.timing is None or after.timing is None:
            entries.append(before if before.timing is None else after)
            continue
        weight = after.timing.repetitions / (before.timing.repetitions + after.timing.repetitions)
        timing = Timing(
            median_s=before.timing.median_s * (1 - weight) + after.timing.median_s * weight,
            low_s=min(before.timing.low_s, after.timing.low_s),
            high_s=max(before.timing.high_s, after.timing.high_s),
            repetitions=before.timing.repetitions + after.timing.repetitions,
            ratio=_joined_ratio(before.timing.ratio, after.timing.ratio, weight),
        )
        figures = {
            name: before.figures[name] * (1 - weight) + value * weight
            for name, value in after.figures.items()
        }
        entries.append(replace(after, timing=timing, figures=figures))
    return replace(again, entries=entries)


def _joined_ratio(first: Ratio | None, again: Ratio | None, weight: float) -> Ratio | None:
    if first is None or again is None:
        return None
    return Ratio(
        median=first.median * (1 - weight) + again.median * weight,
        low=min(first.low, again.low),
        high=max(first.high, again.high),
    )


_FIXED = ("row", "task", "shape", "contender", "median ms", "quartiles ms", "runs")
_LAST = ("ours is … × as fast", "quartiles ×", "error", "status")


def _columns(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    middle: dict[str, None] = {}
    if any(row.limit_s is not None for row in rows):
        middle |= dict.fromkeys(("limit ms", "share of limit"))
    if any(row.target_s is not None for row in rows):
        middle["target ms"] = None
    for row in rows:
        if row.work is not None:
            middle[f"{row.work[1]}/s"] = None
    for row in rows:
        for entry in row.entries:
            middle |= dict.fromkeys(entry.figures)
    return [*_FIXED, *middle, *_LAST]


def _cells(row: Row, entry: Entry, columns: Sequence[str]) -> list[str]:
    cells = {
        "row": row.row,
        "task": row.what,
        "shape": row.shape,
        "contender": entry.name,
        "limit ms": _milliseconds(row.limit_s),
        "target ms": _milliseconds(row.target_s),
        "error": "" if entry.error is None else f"{entry.error:.1e}",
        "status": entry.status.replace("|", "/"),
    }
    cells |= {name: number(value) for name, value in entry.figures.items()}
    if entry.timing is not None:
        cells |= _timed_cells(row, entry.timing)
    return [cells.get(column, "") for column in columns]


def _timed_cells(row: Row, timing: Timing) -> dict[str, str]:
    cells = {
        "median ms": _milliseconds(timing.median_s),
        "quartiles ms": f"{_milliseconds(timing.low_s)}–{_milliseconds(timing.high_s)}",
        "runs": str(timing.repetitions),
    }
    if row.limit_s is not None:
        cells["share of limit"] = f"{row.limit_s / timing.median_s:.2f}"
    if row.work is not None:
        amount, unit = row.work
        cells[f"{unit}/s"] = number(amount / timing.median_s)
    engine_timing = row.entries[0].timing
    if engine_timing is not None and timing is not engine_timing:
        cells["ours is … × as fast"] = f"{timing.median_s / engine_timing.median_s:.2f}"
    if timing.ratio is not None:
        cells["quartiles ×"] = f"{timing.ratio.low:.2f}–{timing.ratio.high:.2f}"
    return cells


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else number(seconds * 1e3)
