"""The table of what must not break: each promise with its tests, run now, and what held, as a report."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from fault_table import Outcome
from promises import ROOT, ROWS, Row

from glm_rlhf.engine.bench.machine import description

REPORT = ROOT / "benchmarks" / "results" / "reliability"


def summary(row: Row, tests: dict[str, str], cases: list[Outcome]) -> dict:
    """Return what was tried of a promise, and what held."""
    own = {
        name: outcome
        for name, outcome in tests.items()
        if any(name == test or name.startswith((f"{test}::", f"{test}[")) for test in row.tests)
    }
    mine = [outcome for outcome in cases if outcome.case.row == row.number]
    failed = [name for name, outcome in own.items() if outcome == "failed"]
    failed += [f"{one.case.fault}: {one.failure[:300]}" for one in mine if one.failure]
    num_skipped = sum(outcome == "skipped" for outcome in own.values())
    tried = len(own) - num_skipped + len(mine)
    seconds = [one.seconds for one in mine if math.isfinite(one.case.promise.deadline_s)]
    return {
        "row": row.number,
        "promise": row.promise,
        "wanted": row.wanted,
        "tried_tests": len(own) - num_skipped,
        "tried_cases": len(mine),
        "skipped": num_skipped,
        "held": tried - len(failed),
        "slowest_s": round(max(seconds), 1) if seconds else None,
        "tests": list(row.tests),
        "failed": failed,
        "missing": row.missing,
        "is_held": not failed and tried >= row.least,
    }


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_every_promise_is_tried_and_reported(tried):
    rows = [summary(row, tried.tests, tried.faults) for row in ROWS]
    write_report(rows, tried.faults, tried.elapsed_s)
    assert [row["row"] for row in rows] == list(range(1, 29))
    assert all(row["is_held"] for row in rows), [row for row in rows if not row["is_held"]]


def write_report(rows: list[dict], cases: list[Outcome], elapsed_s: float) -> None:
    """Write what was tried and held, for people and for programs."""
    facts = description(torch.device("cpu"))
    faults = [
        asdict(one.case.fault)
        | {
            "row": one.case.row,
            "settings": [setting for setting in one.case.settings if "{" not in setting],
            "promise": one.case.promise.promise,
            "seconds": None if math.isnan(one.seconds) else round(one.seconds, 1),
            "failure": one.failure[:300],
        }
        for one in cases
    ]
    REPORT.with_suffix(".json").write_text(
        json.dumps({"machine": facts, "rows": rows, "faults": faults}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    num_held = sum(row["is_held"] for row in rows)
    num_in_part = sum(row["is_held"] and bool(row["missing"]) for row in rows)
    lines = [
        "# What must not break, and how it is shown",
        "",
        f"{num_held} of {len(rows)} promises held in what was tried, {num_in_part} of them in part, by "
        "`make soak` on a CPU with gloo. A test may try many things; a case is one faulty run of the second "
        "table. Skipped tests do not count.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- tests and faulty runs at the same time, {elapsed_s:.0f} s together",
        "",
        "| # | promise | figure | tried: tests, cases | held | slowest, s | tests |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        tried = f"{row['tried_tests']}, {row['tried_cases']}"
        held = f"{row['held']}{', in part' if row['missing'] else ''}"
        held = held if row["is_held"] else f"**{row['held']}, not held**"
        names = ", ".join(f"`{test.removeprefix('tests/')}`" for test in row["tests"])
        lines.append(
            f"| {row['row']} | {row['promise']} | {row['wanted']} | {tried} | {held} | "
            f"{row['slowest_s'] or ''} | {names} |"
        )
    lines += ["", "In part:", ""]
    lines += [f"- {row['row']}: {row['missing']}" for row in rows if row["missing"]]
    lines += [
        "",
        "## Faults of one rank",
        "",
        "PPO of a tiny GLM, 3 iterations on 2 gloo ranks under torchrun's agent; the fault meets one rank as "
        "the phase begins for the second time. Seconds: from the fault to the end of torchrun and all ranks, "
        "where the run ends by it.",
        "",
        "| # | fault | phase | rank | promise | seconds | tried |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fault, one in zip(faults, cases, strict=True):
        phase = ", ".join([fault["phase"], *fault["settings"]])
        shown = "" if one.case.promise.is_success else fault["seconds"]
        lines.append(
            f"| {fault['row']} | {fault['kind']} | {phase} | {fault['rank']} | {fault['promise']} | "
            f"{shown} | {fault['failure'] or 'held'} |"
        )
    REPORT.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
