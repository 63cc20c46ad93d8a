"""How many files a command opens: functions of the package in the order of their first call.

python -m benchmarks.walk ppo model.path=M data.path=P reward.function=rw:length train.steps=1
python -m benchmarks.walk --list --start .update sft …

A reader who follows the command opens every file once, and changes file wherever the next function lies in
another. Calls of the main thread count; comprehensions and lambdas do not.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import glm_rlhf.engine
from glm_rlhf.engine.cli import main as run_command

ROOT = Path(glm_rlhf.engine.__file__).resolve().parents[1]
PACKAGES = ("engine", "kernels", "parallel")


@dataclass(frozen=True, slots=True)
class Called:
    """A function, by its file and its qualified name."""

    file: Path
    """Relative to the folder of the package."""
    name: str
    """Such as `PPORoles.generate`."""


def walk(arguments: Sequence[str]) -> tuple[list[Called], int]:
    """Return the functions that a command calls, in the order of their first call, and its exit status."""
    known: dict[tuple[str, str], Called | None] = {}

    def record(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename, code.co_qualname) not in known:
            known[code.co_filename, code.co_qualname] = _called(code)

    sys.setprofile(record)
    try:
        status = run_command(list(arguments))
    finally:
        sys.setprofile(None)
    return list(dict.fromkeys(called for called in known.values() if called is not None)), status


def _called(code: CodeType) -> Called | None:
    """Return the function of some code; None for a module, a class body, a lambda, or another package's."""
    if code.co_name.startswith("<") or not code.co_flags & 1:  # 1: has fast locals, as functions have
        return None
    path = Path(code.co_filename).resolve()
    if not any(path.is_relative_to(ROOT / package) for package in PACKAGES):
        return None
    return Called(path.relative_to(ROOT), code.co_qualname)


def count_text(functions: Sequence[Called]) -> str:
    """Return how many files the functions lie in, and how often the next one lies in another."""
    files = [called.file for called in functions]
    num_changes = sum(file != before for file, before in zip(files, [None, *files], strict=False))
    return f"{len(set(files))} files, {num_changes} changes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, print the counts to stderr and return the command's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--start", default=".generate", help="end of the name that the second count begins at"
    )
    parser.add_argument("--list", action="store_true", help="print every function, file by file")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="of glm-rlhf, with its settings")
    options = parser.parse_args(arguments)
    functions, status = walk(options.command)
    if options.list:
        for called in functions:
            print(f"{called.file} {called.name}")
    counts = [f"whole: {count_text(functions)}"]
    starts = [index for index, called in enumerate(functions) if called.name.endswith(options.start)]
    if starts:
        counts.append(f"from {functions[starts[0]].name} on: {count_text(functions[starts[0] :])}")
    print("; ".join(counts), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
