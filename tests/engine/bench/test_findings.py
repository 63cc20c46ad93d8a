"""What a run of `bench` writes, and what two runs say of each other."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import pytest

from glm_rlhf.engine.bench.findings import Findings, agreement_text, compare, read_earlier, write_findings
from glm_rlhf.engine.bench.harness import Entry, Ratio, Timing
from glm_rlhf.engine.bench.parts.scaling import ScalingPoint, efficiencies, read_point, write_point
from glm_rlhf.engine.bench.report import Row


def entry(name: str, median_s: float, ratio: Ratio | None = None, **figures: float) -> Entry:
    low_s, high_s = 0.9 * median_s, 1.1 * median_s
    timing = Timing(median_s=median_s, low_s=low_s, high_s=high_s, repetitions=5, ratio=ratio)
    return Entry(name=name, timing=timing, figures={key.replace("_", " "): n for key, n in figures.items()})


def row(name: str, *entries: Entry, limit_s: float | None = None) -> Row:
    return Row(row=name, what=f"{name} & what", shape="T 4", command="x", entries=entries, limit_s=limit_s)


def point(num_ranks: int, weak_s: float, strong_s: float) -> ScalingPoint:
    return ScalingPoint(
        num_ranks=num_ranks, backend="gloo", tokens=64, weak_s=(weak_s,) * 3, strong_s=(strong_s,) * 3
    )


def findings(factor: float = 1.0) -> Findings:
    phases = {"generate_ms": 100.0, "score_ms": 50.0, "critic_ms": 25.0, "policy_ms": 25.0}
    return Findings(
        machine={"device": "CPU"},
        rows=[
            row("a1", entry("ours", 0.002 * factor), entry("torch eager", 0.004), limit_s=0.001),
            row("ppo", entry("ours", 0.2, **phases)),
            row("save", entry("ours", 0.1), Entry(name="peer", status="absent: not installed")),
        ],
        scaling=[point(1, 1.0, 1.0), point(2, 1.25, 0.625)],
        notes=["a note"],
        seconds=3.0,
    )


def test_a_run_is_a_table_a_page_data_and_three_plots(tmp_path):
    text = write_findings(findings(), tmp_path, earlier=None)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines() if "torch eager" in line}
    assert lines["a1"][-1] == "2.00"  # times that ours is as fast
    assert "absent: not installed" in text
    page = (tmp_path / "bench.md").read_text()
    assert "| 2 | 1250 (1250–1250) | 0.80 | 625 (625–625) | 0.80 |" in page
    for name in ("roofline.svg", "phases.svg", "scaling.svg"):
        assert f"({name})" in page
        plot = ElementTree.parse(tmp_path / name).getroot()
        assert plot.tag == "{http://www.w3.org/2000/svg}svg"
        assert "http" not in (tmp_path / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert "generate 100 (50%)" in (tmp_path / "phases.svg").read_text()
    assert "a1 a1 &amp; what: 0.5" in (tmp_path / "roofline.svg").read_text()
    (engine, _) = json.loads((tmp_path / "bench.json").read_text())["rows"][0]["entries"]
    assert engine["timing"]["median_s"] == 0.002


def test_what_was_not_measured_has_no_plot(tmp_path):
    nothing = Findings(machine={}, rows=[], scaling=[], notes=[], seconds=0.0)
    write_findings(nothing, tmp_path, earlier=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]


@pytest.mark.parametrize(("factor", "alike"), [(1.0, 4), (1.15, 4), (1.3, 3)])
def test_two_runs_are_compared_by_their_ranges(tmp_path, factor, alike):
    write_findings(findings(), tmp_path, earlier=None)
    earlier = read_earlier(tmp_path / "bench.json")
    rows = findings(factor).rows
    moved = compare(rows, earlier)
    assert len(moved) == 4  # the absent peer has no time
    assert sum(one.overlaps for one in moved) == alike
    assert max(one.factor for one in moved) == pytest.approx(factor)
    text = agreement_text(rows, earlier)
    assert f"in {alike} of 4 timings" in text
    assert f"the factor {factor:.2f} (" in text
    assert f"÷ ours moved by {1 - 1 / factor:.0%} typically; in 1 of 1 the same" in text


def test_a_peer_that_was_slower_and_is_faster_now_is_counted(tmp_path):
    write_findings(findings(), tmp_path, earlier=None)
    text = agreement_text(findings(3.0).rows, read_earlier(tmp_path / "bench.json"))
    assert "in 0 of 1 the same of the two is faster" in text


@pytest.mark.parametrize(("low", "high", "alike"), [(1.8, 2.2, 1), (2.3, 2.5, 0)])
def test_quotients_turn_by_turn_are_compared_by_their_ranges(low, high, alike):
    """However much faster the machine has become."""
    old, new = (
        row("a1", entry("ours", 1.0 * speed), entry("peer", 2.0 * speed, Ratio(median=2.0, low=a, high=b)))
        for speed, a, b in ((1.0, 1.9, 2.1), (0.5, low, high))
    )
    text = agreement_text([new], {"rows": [asdict(old)]})
    assert "in 0 of 2 timings" in text
    assert f"ranges that overlap in {alike} of 1." in text


def test_another_shape_is_not_compared(tmp_path):
    write_findings(findings(), tmp_path, earlier=None)
    earlier = json.loads((tmp_path / "bench.json").read_text())
    for one in earlier["rows"]:
        one["shape"] = "T 8"
    assert compare(findings().rows, earlier) == []
    assert "timed nothing" in agreement_text(findings().rows, earlier)


@pytest.mark.parametrize(
    ("content", "says"), [("{", "cannot be read"), ("[]", "has no rows"), (None, "cannot")]
)
def test_an_earlier_run_that_is_none_is_refused(tmp_path, content, says):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"bench\.earlier: .*{says}"):
        read_earlier(path)


def test_efficiencies_are_shares_of_the_ideal(tmp_path):
    points = [point(2, 1.0, 4.0), point(4, 2.0, 2.0), point(8, 1.0, 2.0)]
    assert efficiencies(points) == {"weak": [1.0, 0.5, 1.0], "strong": [1.0, 1.0, 0.5]}
    write_point(points[0], tmp_path / "sub" / "scaling.json")
    assert read_point(tmp_path / "sub" / "scaling.json") == points[0]
    assert asdict(points[0])["weak_s"] == (1.0, 1.0, 1.0)
