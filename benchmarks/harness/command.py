"""A benchmark as a command: its options, its rows, its report.

`Benchmark` is one whose verdict follows from its rows; `parse` and `finish` are the two ends of the others.
"""

import inspect
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.report import Report, Row, write

Options = Mapping[str, tuple[Any, ...]]
"""Of each option, by its name: default, help and, where the default does not say it, the type or all choices.

A list takes several values, False is a switch, None is not shown as the default.
"""
DEVICE = ("auto", "where to measure", ("auto", "cpu", "cuda"))
"""The option of benchmarks that also run on CUDA; see `device_of`."""


def parse(
    arguments: Sequence[str] | None, *, doc: str, options: Options, out: str | None = None
) -> Namespace:
    """Return the options of a command line, as attributes.

    Args:
        arguments: of the command line; None for this process's.
        doc: docstring of the module, shown by `--help`.
        options: of this benchmark.
        out: name of its report in `RESULTS`, which gives it the option `--out`; None for one without.
    """
    parser = ArgumentParser(description=inspect.cleandoc(doc), formatter_class=RawDescriptionHelpFormatter)
    for name, (default, text, *kinds) in options.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        values = default if isinstance(default, list) else [default]
        kind = kinds[0] if kinds else type(values[0])
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        parser.add_argument(
            flag,
            type=str if isinstance(kind, tuple) else kind,
            choices=kind if isinstance(kind, tuple) else None,
            nargs="+" if values is default else None,
            default=default,
            help=text if default in (None, []) else f"{text}, default {shown}",
        )
    if out is not None:
        parser.add_argument("--out", type=Path, default=RESULTS / out, help="report, without its suffix")
    return parser.parse_args(arguments)


def device_of(name: str) -> torch.device:
    """Return the device of the option `DEVICE`; `auto` is CUDA where there is one."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def finish(report: Report, out: Path, verdict: str = "", *, has_failed: bool) -> int:
    """Write a report, print where it is and what it says, and return the exit status."""
    write(report, out)
    print(f"{out}.md{': ' * bool(verdict)}{verdict}")
    return int(has_failed)


def has_status(rows: Sequence[Row]) -> bool:
    """Return whether a contender was wrong, failed or absent."""
    return any(entry.status for row in rows for entry in row.entries)


def errors_exceed(tolerance: float) -> Callable[[Sequence[Row]], bool]:
    """Return the rule by which rows fail with an error above a tolerance."""
    return lambda rows: any(entry.error > tolerance for row in rows for entry in row.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark of the CPU: what it measures, and how it reports that."""

    doc: str
    """Docstring of its module."""
    name: str
    """Of its report in `RESULTS`."""
    title: str
    """Of its report."""
    claim: Callable[[str], str]
    """Given the verdict, the text above the table."""
    notes: Sequence[str]
    """How it was measured."""
    measure: Callable[[Namespace], list[Row]]
    """Given the options, the rows."""
    verdict: Callable[[Sequence[Row]], str]
    """Of the rows, on the claim."""
    options: Options = field(default_factory=dict)
    """Besides `--out`."""
    fails: Callable[[Sequence[Row]], bool] = has_status
    """Whether the exit status is 1."""

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Measure, write the report and return the exit status."""
        options = parse(arguments, doc=self.doc, options=self.options, out=self.name)
        rows = self.measure(options)
        verdict = self.verdict(rows)
        report = Report(
            title=self.title,
            claim=self.claim(verdict),
            machine=description(torch.device("cpu")),
            rows=rows,
            notes=self.notes,
        )
        return finish(report, options.out, verdict, has_failed=self.fails(rows))

    def run(self) -> None:
        """End this process with the exit status of `main`."""
        sys.exit(self.main())
