"""One report over several thread counts, each of them in a process of its own."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.harness.fresh_process import in_fresh_process
from glm_rlhf.engine.bench.report import Row


def parse_options(
    arguments: Sequence[str] | None, *, doc: str, name: str, budget_s: float
) -> argparse.Namespace:
    """Return the options `threads`, `budget_s` and `out`.

    Args:
        arguments: of the command line; None for this process's.
        doc: what the benchmark says of itself.
        name: of its report in `RESULTS`.
        budget_s: seconds of timed runs a row where none are given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts, default 1 2")
    parser.add_argument(
        "--budget-s", type=float, default=budget_s, help=f"seconds of timed runs a row, default {budget_s:g}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / name, help="report, without its suffix")
    return parser.parse_args(arguments)


def rows_of(options: argparse.Namespace, measure_rows: Callable[[int, float], list[Row]]) -> list[Row]:
    """Return what `measure_rows(threads, budget_s)` gives at each thread count, on the CPU."""
    rows = []
    for threads in options.threads:
        environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        rows += in_fresh_process(measure_rows, threads, options.budget_s, environment=environment)
    return rows
