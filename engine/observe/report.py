"""The report of a run: one self-contained HTML file."""

import contextlib
import html
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_rlhf.engine.observe.metrics_file import FILE_NAME as METRICS_NAME
from glm_rlhf.engine.observe.metrics_file import read_metrics
from glm_rlhf.engine.observe.svg_charts import Point, line_chart, number
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.storage.durable_io import replace_text

FILE_NAME = "report.html"
SAMPLES_FOLDER = "samples"
SAMPLES_AFTER = "after.jsonl"
"""Answers after the last iteration, to the prompts of the first iteration's samples."""

_TOTALS = ("timing_s/iteration", "timing_s/step")
_MAX_SAMPLES = 24
_GROUPS = (
    ("Reward", lambda name: "reward/minus_baseline/" in name or ("rewards/" in name and name[:4] != "eval")),
    ("Evaluation", lambda name: name.startswith("eval")),
    ("KL", lambda name: "kl" in name.rpartition("/")[2].split("_")),
    ("Length", lambda name: "length" in name),
    ("Loss", lambda name: name.endswith("loss")),
    ("Gradient", lambda name: name.endswith(("grad_norm", "lr", "is_step_skipped"))),
    ("Speed", lambda name: name.startswith("perf/")),
    ("Seconds", lambda name: name.startswith("timing_s/")),
    ("Others", lambda name: True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """A table of results that are not metrics of a step, such as those of an evaluation."""

    title: str
    """Heading above the table."""
    columns: tuple[str, ...]
    """Column headings."""
    rows: tuple[tuple[object, ...], ...]
    """Cells: floats are shown with four digits, other values by `str`."""
    note: str = ""
    """Text below the table."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {self.title!r} has {len(row)} cells for {len(self.columns)} columns"
                )


def write_report(
    run_folder: str | Path, *, title: str | None = None, tables: Sequence[ReportTable] = ()
) -> Path:
    """Write `<run_folder>/report.html` from the files in the folder, and return its path.

    The report shows, as far as they exist: curves of `metrics.jsonl`, seconds of each phase, answers before
    and after training from `samples/`, and `config.yaml`. It refers to no other file and runs no script.

    Args:
        run_folder: of a run. Incomplete lines of the metrics are skipped; of a repeated step the last line
            counts.
        title: of the page; None: the folder's name.
        tables: shown first.

    Raises:
        ValueError: no metrics in the folder.
        OSError: something cannot be read or written.
    """
    folder = Path(run_folder)
    curves = _curves(folder / METRICS_NAME)
    if title is None:
        title = folder.resolve().name
    config = folder / "config.yaml"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _summary(curves),
        *(_table(table) for table in tables),
        _curve_groups(curves),
        _phases(curves),
        _samples(folder / SAMPLES_FOLDER),
        _details("Settings", f"<pre>{html.escape(config.read_text('utf-8'))}</pre>")
        if config.is_file()
        else "",
    ]
    path = folder / FILE_NAME
    page = _PAGE.format(
        title=html.escape(title), style=_STYLE, body="\n".join(part for part in parts if part)
    )
    replace_text(path, page)
    return path


def try_write_report(run_folder: str | Path, *, title: str) -> None:
    """Write the report at the end of a run and log its path; log an error instead of raising it."""
    try:
        log(f"report: {write_report(run_folder, title=title)}")
    except ValueError as error:
        log(f"no report was written: {error}")
    except OSError as error:
        log(f"no report was written: {error.filename}: {error.strerror}")


def _curves(path: Path) -> dict[str, list[Point]]:
    """Return the points of each metric, ascending in step."""
    by_step, num_others = read_metrics(path)
    if num_others:
        log(f"{path}: {num_others} lines are no metrics of a step and are not in the report")
    if not by_step:
        raise ValueError(f"{path} has no complete line: there is nothing to report")
    curves: dict[str, list[Point]] = {}
    for step, line in by_step.items():
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise ValueError(f"{path} has no metric: there is nothing to report")
    return curves


def _samples_in(path: Path) -> Iterator[dict]:
    """Yield the lines of a file of answers, without those that are cut or foreign."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                sample = json.loads(line)
                if isinstance(sample, dict) and {"prompt_tokens", "tokens"} <= sample.keys():
                    yield sample


def _known(points: Sequence[Point]) -> list[float]:
    return [value for _, value in points if value is not None]


def _summary(curves: Mapping[str, list[Point]]) -> str:
    steps = [step for points in curves.values() for step, _ in points]
    rows = []
    for name, points in curves.items():
        values = _known(points)
        if values:
            tenth = math.ceil(len(values) / 10)
            rows.append(
                (
                    name,
                    statistics.fmean(values[:tenth]),
                    statistics.fmean(values[-tenth:]),
                    min(values),
                    max(values),
                )
            )
    total = next((sum(_known(curves[name])) for name in _TOTALS if name in curves), None)
    summary = f"Steps {min(steps)} to {max(steps)}" + (f", {_duration(total)}" if total is not None else "")
    table = ReportTable(
        title="",
        columns=("metric", "first tenth", "last tenth", "min", "max"),
        rows=tuple(rows),
        note="Means over the first and the last tenth of the steps that have a value.",
    )
    return f"<p>{summary}.</p>" + _details("All metrics in numbers", _table(table))


def _curve_groups(curves: Mapping[str, list[Point]]) -> str:
    groups: dict[str, list[str]] = {title: [] for title, _ in _GROUPS}
    for name, points in curves.items():
        groups[next(title for title, holds in _GROUPS if holds(name))].append(line_chart(name, points))
    return "\n".join(
        f'<h2>{title}</h2><div class="charts">{"".join(charts)}</div>'
        for title, charts in groups.items()
        if charts
    )


def _phases(curves: Mapping[str, list[Point]]) -> str:
    """Return a table of phases with bars; phases may be nested."""
    total_name = next((name for name in _TOTALS if name in curves), None)
    if total_name is None:
        return ""
    total = statistics.fmean(_known(curves[total_name]))
    rows = []
    for name, points in curves.items():
        values = _known(points)
        if name.startswith("timing_s/") and name != total_name and values:
            # A phase that is not in all steps counts only in the steps that it is in.
            share = sum(values) / (total * len(curves[total_name])) if total else 0.0
            rows.append((name.removeprefix("timing_s/"), statistics.fmean(values), max(values), share))
    rows.sort(key=lambda row: -row[3])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{number(mean)}</td><td>{number(most)}</td><td>{share:.1%}</td>"
        f'<td class="bar"><div style="width:{min(share, 1):.1%}"></div></td></tr>'
        for name, mean, most, share in rows
    )
    return (
        f"<h2>Phases</h2><p>A step takes {number(total)} s on average. Phases may be nested.</p>"
        "<table><tr><th>phase</th><th>mean s</th><th>max s</th><th>share of all steps</th><th></th></tr>"
        f"{body}</table>"
    )


def _samples(folder: Path) -> str:
    """Return a table of the first file's answers, with those to the same prompts after the last step."""
    files = sorted((path for path in folder.glob("step_*.jsonl") if path.stem[5:].isdecimal()), key=_step_of)
    if not files:
        return ""
    before = list(_samples_in(files[0]))
    last = folder / SAMPLES_AFTER if (folder / SAMPLES_AFTER).exists() else files[-1]
    after: dict[str, list[dict]] = {}
    for sample in _samples_in(last):
        after.setdefault(json.dumps(sample["prompt_tokens"]), []).append(sample)
    rows, num_paired = [], 0
    for sample in before[:_MAX_SAMPLES]:
        again = after.get(json.dumps(sample["prompt_tokens"]))
        later = again.pop(0) if again else None
        num_paired += later is not None
        cells = _answer(later) if later else "<td></td><td></td>"
        rows.append(f"<tr><td>{_prompt(sample)}</td>{_answer(sample)}{cells}</tr>")
    if not num_paired:  # the last file has other prompts: show them too
        for samples in list(after.values())[:_MAX_SAMPLES]:
            rows += [f"<tr><td>{_prompt(s)}</td><td></td><td></td>{_answer(s)}</tr>" for s in samples]
    return (
        "<h2>Samples</h2>"
        f"<p>Before: {html.escape(files[0].stem)} (the answers of step 1 are from before the first update). "
        f"After: {html.escape(last.stem)}.</p>"
        '<table class="samples"><tr><th>prompt</th><th>before</th><th>reward</th><th>after</th>'
        f"<th>reward</th></tr>{''.join(rows)}</table>"
    )


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _prompt(sample: Mapping) -> str:
    return html.escape(sample.get("prompt") or " ".join(map(str, sample["prompt_tokens"])))


def _answer(sample: Mapping) -> str:
    text = sample.get("text")
    if text is None:
        text = " ".join(map(str, sample["tokens"]))
    cut = "" if sample.get("is_finished", True) else ' <span class="cut">cut</span>'
    reward = sample.get("reward")
    return f"<td>{html.escape(text)}{cut}</td><td>{'' if reward is None else number(reward)}</td>"


def _table(table: ReportTable) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{number(cell) if isinstance(cell, float) else html.escape(str(cell))}</td>" for cell in row
        )
        + "</tr>"
        for row in table.rows
    )
    title = f"<h2>{html.escape(table.title)}</h2>" if table.title else ""
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"{title}<table><tr>{head}</tr>{rows}</table>{note}"


def _details(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
color: #1b1f24 }
h2 { margin: 1.6em 0 .4em; font-size: 1.2em }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 10px }
.chart { background: #f7f8fa; border-radius: 6px; font-size: 11px }
.chart text { fill: #555 } .chart .title { fill: #1b1f24; font-size: 13px }
.chart polyline { fill: none; stroke: #2463c2; stroke-width: 1.6 } .chart circle { fill: #2463c2 }
.chart .grid { stroke: #dde1e6 }
table { border-collapse: collapse; margin: .5em 0 } td, th { padding: 3px 12px 3px 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #e5e8ec }
td.bar { width: 280px } td.bar div { background: #2463c2; height: 12px; border-radius: 2px }
.samples td { white-space: pre-wrap; max-width: 330px; overflow-wrap: anywhere } .cut { color: #b3261e }
pre { background: #f7f8fa; padding: 1em; overflow-x: auto } summary { cursor: pointer; margin: .6em 0 }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
