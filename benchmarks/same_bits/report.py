"""The report of a comparison, in markdown."""

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from benchmarks.same_bits.names import NOT_COMPARED
from benchmarks.same_bits.rows import TableRow, all_rows

_PACKAGES = ("torch", "megatron-core", "triton", "numpy", "safetensors", "pydantic")
_NUM_SHOWN = 5
"""Differences of metrics, and of all else, that are shown of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What the comparison of a row found."""

    row: TableRow
    """Command, layout and variant."""
    num_metrics: int = 0
    """Numbers of metrics.jsonl that were compared."""
    num_tensors: int = 0
    """Tensors that were compared, of exports and checkpoint."""
    num_bytes: int = 0
    """Their bytes."""
    differences: Sequence[str] = field(default_factory=list)
    """A sentence for each difference; empty where all bits are the same."""
    failure: str = ""
    """Why a run failed, with its last lines; empty where both ended well."""
    wall_s: float
    """Seconds that both trees together took."""

    @property
    def verdict(self) -> str:
        """`equal`, or the first difference."""
        if self.failure:
            return f"FAILED: {self.failure.splitlines()[0]}"
        if not self.differences:
            return "equal"
        more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
        return f"DIFFERS: {self.differences[0]}{more}"


def as_markdown(results: Sequence[RowResult], commits: Mapping[str, str], wall_s: float) -> str:
    """Return the report.

    Args:
        results: one for each row that was run.
        commits: of the trees, by their names.
        wall_s: seconds of everything.
    """
    num_equal = sum(result.verdict == "equal" for result in results)
    facts = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **commits,
        "processor": f"{_processor()}, {os.cpu_count()} cores; ranks over gloo, one thread each",
        "versions": ", ".join([f"python {platform.python_version()}", *map(_version, _PACKAGES)]),
        "rows": f"{len(results)} of the {len(all_rows())} in the table",
        "not compared": f"metrics that begin with {', '.join(NOT_COMPARED)}",
        "wall time": f"{wall_s / 60:.1f} min",
    }
    lines = [
        "# Same bits",
        "",
        f"{num_equal} of {len(results)} rows are equal to the bit: every metric, every tensor of the "
        "exports, weights and optimizer state of the last checkpoint.",
        "",
        *(f"- {name}: {text}" for name, text in facts.items()),
        "",
        "| command | layout | variant | metrics | tensors | KB | wall s | verdict |",
        "|---|---|---|---:|---:|---:|---:|---|",
        *map(_line, results),
        *(line for result in results for line in _details(result)),
    ]
    return "\n".join(lines) + "\n"


def _line(result: RowResult) -> str:
    row = result.row
    cells = [row.command, row.layout, row.variant.name, str(result.num_metrics), str(result.num_tensors)]
    cells += [f"{result.num_bytes / 1000:.0f}", f"{result.wall_s:.1f}", result.verdict.replace("|", "\\|")]
    return f"| {' | '.join(cells)} |"


def _details(result: RowResult) -> list[str]:
    if result.verdict == "equal":
        return []
    metrics = [text for text in result.differences if text.startswith("step ")]
    others = [text for text in result.differences if not text.startswith("step ")]
    shown = result.failure.splitlines() or [*metrics[:_NUM_SHOWN], *others[:_NUM_SHOWN]]
    return ["", f"## {result.row.name}", "", "```", *shown, "```"]


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
