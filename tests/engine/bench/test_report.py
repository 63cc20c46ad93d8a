"""A report has a line a contender, ratios from the same run, and empty cells where nothing was measured."""

import json
from dataclasses import asdict

import pytest

from glm_rlhf.engine.bench.harness import Entry, Ratio, Timing
from glm_rlhf.engine.bench.report import Report, Row, as_markdown, joined, write


def timing(median_s: float) -> Timing:
    return Timing(median_s=median_s, low_s=median_s / 2, high_s=2 * median_s, repetitions=7)


REPORT = Report(
    title="Title",
    claim="Claim.",
    machine={"device": "CPU"},
    rows=[
        Row(
            row="a1",
            what="task",
            shape="T 4",
            command="python -m benchmarks.x --rows a1",
            entries=[
                Entry(name="ours", timing=timing(0.002), error=1e-7, figures={"extra MB": 3.0}),
                Entry(name="other", timing=timing(0.003)),
                Entry(name="peer", status="absent: not installed"),
            ],
            limit_s=0.001,
            work=(10.0, "tokens"),
        ),
        Row(row="a2", what="unmeasured", shape="T 8", command="c", entries=[], limit_s=0.004),
    ],
)


def cells(contender: str) -> dict[str, str]:
    table = [line for line in as_markdown(REPORT).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    header = rows[0]
    (found,) = [row for row in rows[2:] if row[header.index("contender")] == contender]
    return dict(zip(header, found, strict=True))


def test_ratio_share_and_rate_come_from_the_rows_own_medians():
    engine, other = cells("ours"), cells("other")
    assert engine["median ms"] == "2"
    assert engine["quartiles ms"] == "1–4"
    assert engine["share of limit"] == "0.50"
    assert engine["tokens/s"] == "5000"
    assert engine["extra MB"] == "3"
    assert other["ours is … × as fast"] == "1.50"


def test_what_was_not_measured_is_empty():
    peer, row = cells("peer"), cells("")
    assert peer["status"] == "absent: not installed"
    for column in (
        "median ms",
        "quartiles ms",
        "runs",
        "tokens/s",
        "extra MB",
        "ours is … × as fast",
        "error",
    ):
        assert peer[column] == ""
        assert row[column] == ""
    assert row["limit ms"] == "4"


def test_both_files_are_written_and_json_keeps_every_number(tmp_path):
    write(REPORT, tmp_path / "new" / "name")
    data = json.loads((tmp_path / "new" / "name.json").read_text())
    assert data == json.loads(json.dumps(asdict(REPORT)))
    engine, _, peer = data["rows"][0]["entries"]
    assert engine["timing"]["median_s"] == 0.002
    assert peer["timing"] is None
    text = (tmp_path / "new" / "name.md").read_text()
    assert "python -m benchmarks.x --rows a1" in text


def test_a_row_that_was_measured_twice_has_the_wider_range():
    def row(*entries: Entry) -> Row:
        return Row(row="a1", what="task", shape="T 4", command="x", entries=entries)

    first, again = (
        Timing(median_s=median, low_s=low, high_s=high, repetitions=runs, ratio=ratio)
        for median, low, high, runs, ratio in (
            (1.0, 0.9, 1.1, 10, Ratio(median=2.0, low=1.9, high=2.2)),
            (2.0, 1.8, 2.5, 30, Ratio(median=4.0, low=1.5, high=2.1)),
        )
    )
    late = Entry(name="late", status="failed: later")
    both = joined(
        row(Entry(name="ours", timing=first, figures={"x ms": 10.0}), Entry(name="late", timing=first)),
        row(Entry(name="ours", timing=again, figures={"x ms": 20.0}), late),
    )
    engine, other = both.entries
    assert engine.timing == Timing(
        median_s=1.75,
        low_s=0.9,
        high_s=2.5,
        repetitions=40,
        ratio=Ratio(median=3.5, low=1.5, high=2.2),
    )
    assert engine.figures == {"x ms": pytest.approx(17.5)}
    assert other == late
