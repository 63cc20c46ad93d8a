"""The results of `bench`, as a table on the terminal, Markdown, JSON and plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from glm_rlhf.engine.bench.parts.ppo import PHASES
from glm_rlhf.engine.bench.parts.scaling import ScalingPoint, efficiencies
from glm_rlhf.engine.bench.report import Report, Row, as_markdown, number, table, write_files
from glm_rlhf.engine.observe.svg_charts import bar_chart, scaling_chart, stacked_bar
from glm_rlhf.parallel.storage.durable_io import replace_text

STEM = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that one run measured."""

    machine: dict[str, str]
    """Hardware, versions, commit, date."""
    rows: Sequence[Row]
    """Tasks with their contenders."""
    scaling: Sequence[ScalingPoint]
    """Worlds, fewest ranks first."""
    notes: Sequence[str]
    """Sizes and peers."""
    seconds: float
    """That the run took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How far one contender's figures are from an earlier run's."""

    row: str
    """Row and contender."""
    factor: float
    """Median ÷ the earlier median."""
    overlaps: bool
    """Whether the two ranges between quartiles have a point in common."""
    ratios: tuple[float, ...]
    """Of a peer: its median ÷ that of ours, in the earlier run and in this one; empty for ours."""
    ratios_overlap: bool | None
    """Of a peer timed in turns with ours: whether the ranges of its quotients have a point in common."""


def write_findings(findings: Findings, folder: Path, *, earlier: dict | None) -> str:
    """Write `bench.md`, `bench.json` and the plots into a folder, and return the terminal's table.

    Args:
        findings: of this run.
        folder: run folder; made where it is missing.
        earlier: what `read_earlier` gave; None compares nothing.
    """
    plots = _plots(findings)
    for name, text in plots.items():
        replace_text(folder / name, text)
    agreement = None if earlier is None else agreement_text(findings.rows, earlier)
    report = Report(
        title="Benchmark",
        claim=agreement or "One run; give `bench.earlier=…/bench.json` to compare the next with it.",
        machine=findings.machine,
        rows=findings.rows,
        notes=[*findings.notes, f"the run took {findings.seconds:.0f} s"],
    )
    sections = [as_markdown(report), *_scaling_lines(findings.scaling)]
    sections += [f"![{name.removesuffix('.svg')}]({name})\n" for name in plots]
    write_files(folder / STEM, "\n".join(sections), asdict(findings) | {"agreement": agreement})
    lines = [*_table(findings.rows), *_scaling_lines(findings.scaling), *([agreement] if agreement else [])]
    return "\n".join([*lines, f"written to {folder / STEM}.md", ""])


def read_earlier(path: Path) -> dict:
    """Return the content of an earlier run's `bench.json`.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"bench.earlier: {path} cannot be read: {error}") from error
    if not isinstance(earlier, dict) or "rows" not in earlier:
        raise ValueError(f"bench.earlier: {path} has no rows; give the bench.json of an earlier run")
    return earlier


def compare(rows: Sequence[Row], earlier: dict) -> list[Moved]:
    """Return each contender that both runs timed on the same shape."""
    before = {(row["row"], row["shape"]): _timings(row) for row in earlier["rows"]}
    moved = []
    for row in rows:
        old, new = before.get((row.row, row.shape), {}), _timings(asdict(row))
        engine_name = row.entries[0].name
        for name in new.keys() & old.keys():
            ratios = ()
            if name != engine_name and engine_name in new and engine_name in old:
                ratios = tuple(run[name]["median_s"] / run[engine_name]["median_s"] for run in (old, new))
            pair = old[name].get("ratio"), new[name]["ratio"]
            moved.append(
                Moved(
                    row=f"{row.row} {name}",
                    factor=new[name]["median_s"] / old[name]["median_s"],
                    overlaps=_overlap(old[name], new[name], "_s"),
                    ratios=ratios,
                    ratios_overlap=None if None in pair else _overlap(*pair),
                )
            )
    return moved


def _overlap(old: dict, new: dict, unit: str = "") -> bool:
    """Return whether the ranges between quartiles have a point in common."""
    low, high = f"low{unit}", f"high{unit}"
    return new[low] <= old[high] and old[low] <= new[high]


def agreement_text(rows: Sequence[Row], earlier: dict) -> str:
    """Return the comparison with an earlier run, in sentences."""
    moved = compare(rows, earlier)
    if not moved:
        return "The earlier run timed nothing that this one did."
    num_overlapping = sum(entry.overlaps for entry in moved)
    typical = median(abs(entry.factor - 1) for entry in moved)
    far = max(moved, key=lambda entry: max(entry.factor, 1 / entry.factor))
    text = (
        f"Against the earlier run: in {num_overlapping} of {len(moved)} timings the ranges between quartiles "
        f"overlap. A median moved by {typical:.0%} typically, at most by the factor {far.factor:.2f} "
        f"({far.row})."
    )
    pairs = [entry.ratios for entry in moved if entry.ratios]
    if pairs:
        same = sum((old > 1) == (new > 1) for old, new in pairs)
        typical = median(abs(new / old - 1) for old, new in pairs)
        text += (
            f" A peer's time ÷ ours moved by {typical:.0%} typically; in {same} of {len(pairs)} the same of "
            "the two is faster."
        )
    overlaps = [entry.ratios_overlap for entry in moved if entry.ratios_overlap is not None]
    if overlaps:
        text += f" The quotients turn by turn have ranges that overlap in {sum(overlaps)} of {len(overlaps)}."
    return text


def _timings(row: dict) -> dict[str, dict]:
    """Return the timings of a row, as JSON has it, by contender."""
    return {entry["name"]: entry["timing"] for entry in row["entries"] if entry["timing"] is not None}


def _plots(findings: Findings) -> dict[str, str]:
    """Return the plots by file name, those that there are figures for."""
    plots = {}
    shares = [
        (f"{row.row} {row.what.partition(';')[0][:34]}", row.limit_s / row.entries[0].timing.median_s)
        for row in findings.rows
        if row.limit_s is not None and row.entries[0].timing is not None
    ]
    if shares:
        plots["roofline.svg"] = bar_chart(
            "Kernels: share of the roofline",
            "the larger of bytes ÷ bandwidth and FLOP ÷ rate, over the time taken; 1 is the limit",
            shares,
            mark=1.0,
        )
    for row in findings.rows:
        if row.row == "ppo" and row.entries[0].timing is not None:
            figures = {phase: row.entries[0].figures[f"{phase} ms"] for phase in PHASES}
            plots["phases.svg"] = stacked_bar("PPO: an iteration by phase", "milliseconds", figures)
    if len(findings.scaling) > 1:
        ranks = [point.num_ranks for point in findings.scaling]
        plots["scaling.svg"] = scaling_chart(
            "A training step on more ranks", ranks, efficiencies(findings.scaling)
        )
    return plots


def _scaling_lines(points: Sequence[ScalingPoint]) -> list[str]:
    """Return scaling as a Markdown table."""
    if not points:
        return []
    shares = efficiencies(points)
    lines = [
        "",
        f"A training step over data-parallel ranks, {points[0].backend}; {points[0].tokens} tokens per rank "
        "(weak) or in all (strong); median (fastest–slowest) of the steps, as their slowest rank took them.",
        "",
    ]
    rows = []
    for index, point in enumerate(points):
        cells = [str(point.num_ranks)]
        for name, seconds in (("weak", point.weak_s), ("strong", point.strong_s)):
            low, middle, high = (number(1e3 * s) for s in (min(seconds), median(seconds), max(seconds)))
            cells += [f"{middle} ({low}–{high})", f"{shares[name][index]:.2f}"]
        rows.append(cells)
    head = ("ranks", "weak ms", "weak efficiency", "strong ms", "strong efficiency")
    return [*lines, *table(head, rows), ""]


def _table(rows: Sequence[Row]) -> list[str]:
    """Return lines of aligned columns: row, contender, median, quartiles, times ours."""
    cells = [("row", "contender", "median ms", "quartiles ms", "ours is × as fast")]
    for row in rows:
        for entry in row.entries:
            timing, engine_timing = entry.timing, row.entries[0].timing
            if timing is None:
                cells.append((row.row, entry.name, "", "", entry.status))
                continue
            times = [number(1e3 * seconds) for seconds in (timing.median_s, timing.low_s, timing.high_s)]
            ratio = ""
            if engine_timing is not None and timing is not engine_timing:
                ratio = f"{timing.median_s / engine_timing.median_s:.2f}"
            cells.append((row.row, entry.name, times[0], f"{times[1]}–{times[2]}", ratio))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
    return ["  ".join(line).rstrip() for line in padded]
