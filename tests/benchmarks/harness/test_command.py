"""A declared benchmark is a command: options with their types, a report of two files, an exit status."""

import json
from pathlib import Path

import pytest

from benchmarks.harness.command import DEVICE, Benchmark, errors_exceed, parse
from glm_rlhf.engine.bench.harness import Entry
from glm_rlhf.engine.bench.report import Row

OPTIONS = {
    "device": DEVICE,
    "threads": ([1, 2], "thread counts"),
    "budget_s": (6.0, "seconds"),
    "rows": ([], "all where there are none", str),
    "no_compile": (False, "exclude torch.compile"),
    "folder": (None, "of the runs", Path),
}


def test_options_have_the_types_of_their_defaults():
    arguments = ["--threads", "4", "--budget-s", "1", "--rows", "a1", "--no-compile", "--folder", "x"]
    options = parse(arguments, doc="Text.", options=OPTIONS)
    assert (options.threads, options.budget_s, options.rows) == ([4], 1.0, ["a1"])
    assert options.no_compile
    assert options.folder == Path("x")
    assert options.device == "auto"


def test_defaults_hold_and_are_shown(capsys):
    options = parse([], doc="Text.", options=OPTIONS)
    assert (options.threads, options.budget_s, options.rows) == ([1, 2], 6.0, [])
    assert (options.no_compile, options.folder) == (False, None)
    with pytest.raises(SystemExit):
        parse(["--help"], doc="Text.", options=OPTIONS)
    text = capsys.readouterr().out
    assert "thread counts, default 1 2" in text
    assert "seconds, default 6" in text
    assert "all where there are none\n" in text


@pytest.mark.parametrize(("error", "status"), [(1e-6, 0), (1e-2, 1)])
def test_a_benchmark_writes_both_files_and_fails_by_its_rule(tmp_path, capsys, error, status):
    def measure(options) -> list[Row]:
        entries = [Entry(name="ours", error=error)] * options.runs
        return [Row(row="a", what="task", shape="T 4", command="c", entries=entries)]

    benchmark = Benchmark(
        doc="Text.",
        name="name",
        title="Title",
        options={"runs": (1, "of each")},
        measure=measure,
        verdict=lambda rows: f"{len(rows[0].entries)} runs",
        claim=lambda verdict: f"Claim: {verdict}",
        notes=("a note",),
        fails=errors_exceed(1e-4),
    )
    out = tmp_path / "report"
    assert benchmark.main(["--runs", "3", "--out", str(out)]) == status
    assert capsys.readouterr().out == f"{out}.md: 3 runs\n"
    assert "Claim: 3 runs" in out.with_suffix(".md").read_text()
    assert len(json.loads(out.with_suffix(".json").read_text())["rows"][0]["entries"]) == 3
