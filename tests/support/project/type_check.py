"""Checks types with mypy: a sub-package has as many errors as pyproject.toml records for it, or none.

`python tests/support/project/type_check.py`; with `--record` counts that fell are written down, in place of
being refused. A count never rises by it.
"""

import collections
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ("engine", "kernels", "parallel")
LINKS = ROOT / ".mypy_packages" / "glm_rlhf"
HEADER = "[tool.glm-rlhf.mypy_errors]\n"


def main(arguments: list[str]) -> int:
    """Return 0 where every count is the recorded one, else 1, with what differs on stderr."""
    pyproject = ROOT / "pyproject.toml"
    text = pyproject.read_text(encoding="utf-8")
    recorded = tomllib.loads(text)["tool"]["glm-rlhf"]["mypy_errors"]
    link_layers()
    errors = errors_by_room(mypy_output())
    if arguments == ["--record"]:
        recorded = lowered(errors, recorded)
        pyproject.write_text(with_counts(text, recorded), encoding="utf-8")
    differences = compare(errors, recorded)
    sys.stderr.write("".join(f"{line}\n" for line in differences))
    if not differences:
        print(f"mypy: {sum(recorded.values())} errors, all recorded; {len(recorded)} sub-packages have any")
    return 1 if differences else 0


def link_layers() -> None:
    """Make the folder in which mypy finds the layers as packages of the namespace `glm_rlhf`."""
    LINKS.mkdir(parents=True, exist_ok=True)
    for floor in LAYERS:
        if not (LINKS / floor).is_symlink():
            (LINKS / floor).symlink_to(Path("..", "..", floor))


def mypy_output() -> str:
    """Return what mypy says.

    Raises:
        RuntimeError: it did not come to an end.
    """
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-error-summary",
        "--hide-error-context",
    ]
    paths = ("PYTHONPATH", "MYPYPATH")  # modules are found by the links alone
    variables = {name: value for name, value in os.environ.items() if name not in paths}
    answer = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if answer.returncode > 1 or answer.stderr:
        raise RuntimeError(f"mypy failed: {answer.stderr or answer.stdout}")
    return answer.stdout


def errors_by_room(output: str) -> dict[str, list[str]]:
    """Return mypy's errors by sub-package, such as `engine/rl`; `engine` for the floor's own files.

    Raises:
        RuntimeError: they are of other files, such as those of an installed wheel.
    """
    found = collections.defaultdict(list)
    for line in output.splitlines():
        if match := re.match(r"(.+?)\.pyi?:\d+: error: ", line):
            if not line.startswith(f"{LINKS.relative_to(ROOT)}/"):
                raise RuntimeError(f"mypy reads other files than the checkout's, run make install: {line}")
            parts = match[1].removeprefix(f"{LINKS.relative_to(ROOT)}/").split("/")[:-1]
            found["/".join(parts[:2])].append(line.removeprefix(f"{LINKS.relative_to(ROOT)}/"))
    return dict(found)


def compare(errors: dict[str, list[str]], recorded: dict[str, int]) -> list[str]:
    """Return what differs from the record, in lines; none where nothing does."""
    lines = []
    for room in sorted({*errors, *recorded}):
        count, allowed = len(errors.get(room, [])), recorded.get(room, 0)
        if count > allowed:
            lines += [
                *errors[room],
                f"{room}: mypy finds {count} errors, {allowed} are recorded: fix the new ones",
            ]
        elif count < allowed:
            lines.append(
                f"{room}: mypy finds {count} errors, {allowed} are recorded: run {sys.argv[0]} --record"
            )
    return lines


def lowered(errors: dict[str, list[str]], recorded: dict[str, int]) -> dict[str, int]:
    """Return the record with the counts that fell; a sub-package without errors leaves it."""
    counts = {room: min(count, len(errors.get(room, []))) for room, count in recorded.items()}
    return {room: count for room, count in sorted(counts.items()) if count}


def with_counts(text: str, counts: dict[str, int]) -> str:
    """Return the text of pyproject.toml with these counts in the place of its own."""
    before, _, rest = text.partition(HEADER)
    after = rest[re.match(r"(?:.+\n)*", rest).end() :]
    return before + HEADER + "".join(f'"{room}" = {count}\n' for room, count in counts.items()) + after


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
