"""Whether this tree computes what a commit computes, to the bit, in every command and layout.

python -m benchmarks.same_bits COMMIT [--command ppo ...] [--layout tp2 ...] [--variant resumed ...]

A refactor changes no number. This runs the training commands from a worktree of COMMIT and from this tree, on
the same inputs and machine, and compares every metric, every tensor of the Hugging Face folders and every
tensor of the last checkpoint. The exit code is 1 where anything differs or a run fails.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.same_bits.comparison import compare
from benchmarks.same_bits.inputs import write_inputs
from benchmarks.same_bits.report import RowResult, as_markdown
from benchmarks.same_bits.rows import COMMANDS, LAYOUTS, TableRow, all_rows, chosen_rows
from benchmarks.same_bits.trees import ROOT, Tree, commit_of, git, worktree


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write the report; return 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    variants = sorted({row.variant.name for row in all_rows()})
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=(), help="default: all")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=(), help="default: all")
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=variants,
        default=(),
        metavar="NAME",
        help="default: all; '' is the base",
    )
    parser.add_argument("--report", type=Path, default=RESULTS / "same_bits.md", help="file to write")
    options = parser.parse_args(arguments)
    try:
        git("rev-parse", "--verify", "--quiet", f"{options.commit}^{{commit}}")
    except RuntimeError:
        parser.error(f"{options.commit} is no commit of {ROOT}")
    rows = chosen_rows(options.command, options.layout, options.variant)
    if not rows:
        parser.error("no row of the table is of these commands, layouts and variants")
    start = time.monotonic()
    results, commits = compare_trees(options.commit, rows)
    text = as_markdown(results, commits, time.monotonic() - start)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(text, encoding="utf-8")
    print(text)
    return int(any(result.verdict != "equal" for result in results))


def compare_trees(commit: str, rows: Sequence[TableRow]) -> tuple[list[RowResult], dict[str, str]]:
    """Return what each row shows, and the commit of each tree by its name; progress goes to stderr."""
    results = []
    with worktree(commit) as root, tempfile.TemporaryDirectory(prefix="same_bits_runs_") as scratch:
        inputs = write_inputs(Path(scratch) / "inputs")
        with Tree("before", root, inputs) as before, Tree("after", ROOT, inputs) as after:
            for row in rows:
                results.append(compare(row, before, after, Path(scratch) / "runs"))
                sys.stderr.write(f"{results[-1].wall_s:6.1f} s  {row.name}: {results[-1].verdict}\n")
            return results, {tree.name: commit_of(tree.root) for tree in (before, after)}


if __name__ == "__main__":
    sys.exit(main())
