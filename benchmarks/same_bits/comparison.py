"""One row of the table, run in both trees and compared."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from benchmarks.same_bits.outcome import RunNumbers, differences, read_outcome
from benchmarks.same_bits.report import RowResult
from benchmarks.same_bits.rows import TableRow
from benchmarks.same_bits.trees import RunFailure, Tree


def compare(row: TableRow, before: Tree, after: Tree, folder: Path) -> RowResult:
    """Return what a row shows; both trees run at the same time, below `folder`, which is removed."""
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(2) as pool:
            old, new = pool.map(lambda tree: outcome_of(row, tree, folder / tree.name), (before, after))
    except (RunFailure, ValueError, OSError, SafetensorError) as error:
        facts = {"failure": str(error)}
    else:
        facts = {"num_metrics": len(old.metrics), "num_tensors": len(old.tensors), "num_bytes": old.num_bytes}
        facts["differences"] = [*not_taken(row, old), *differences(old, new)]
    shutil.rmtree(folder, ignore_errors=True)
    return RowResult(row=row, wall_s=time.monotonic() - start, **facts)


def outcome_of(row: TableRow, tree: Tree, folder: Path) -> RunNumbers:
    """Return what the runs of a row leave in one tree.

    Raises:
        RunFailure: a run failed.
        ValueError: a key or a metric is not what the tables of names say.
    """
    for run in row.runs:
        run_folder = tree.run(row.command, run, folder)
    return read_outcome(run_folder)


def not_taken(row: TableRow, outcome: RunNumbers) -> list[str]:
    """Return a sentence for each metric that should show that the variant's path was taken, and does not."""
    seen = {name.split(" ", 2)[2] for name, number in outcome.metrics.items() if number}
    return [
        f"{name} is never other than 0: the path is not taken"
        for name in row.variant.shows
        if name not in seen
    ]
