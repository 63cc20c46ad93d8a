"""What needs a CUDA device, in two parts of less than eight minutes; one report each.

python -m benchmarks.kernels.gpu                 GPU tests, kernel tests on CUDA, rows a to i at full shapes
python -m benchmarks.kernels.gpu --part models   rows j to n at full shapes; needs megatron-core
python -m benchmarks.kernels.gpu --dry-run       says what would run, and what would be excluded and why

Writes $OUT/gpu.md and .json, or $OUT/gpu_models.md and .json (OUT: benchmarks/results).

Exit codes: 0 done, 1 a test failed or a row was not measured, 2 there is no CUDA device.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "kernels", "parallel")
# Tests that do without Megatron-core: elsewhere a file that cannot be imported ends the whole run.
WITHOUT_MEGATRON = "tests/kernels"
PARTS = {"kernels": "gpu", "models": "gpu_models"}
"""The report of each, without its suffix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStep:
    """One command of the run."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    """After so many seconds it is stopped, and counts as failed."""
    result: Path | None = None
    """JUnit file that it writes, None where it is no test."""


@dataclass(slots=True)
class StepOutcome:
    """The outcome of a step."""

    name: str
    status: str
    """`passed`, or what went wrong."""
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    """Tests by outcome."""
    failed: list[str] = field(default_factory=list)
    """Names of the tests that failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, write the report and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=default_out, help="folder of the report")
    parser.add_argument("--part", choices=tuple(PARTS), default="kernels", help="default kernels")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and end")
    options = parser.parse_args(arguments)
    excluded = reasons(options.part)
    with tempfile.TemporaryDirectory() as folder:
        steps = plan(Path(folder), options.part, has_megatron=not excluded)
        if options.dry_run:
            for step in steps:
                print(f"{step.name} (at most {step.limit_s:.0f} s): {' '.join(step.command)}")
            for reason in excluded:
                print(f"excluded: {reason}")
            return 0
        if not torch.cuda.is_available():
            print("no CUDA device is at hand, so nothing was run or written", file=sys.stderr)
            return 2
        with import_paths() as environment:
            outcomes = [run_step(step, environment) for step in steps]
        write_report(options.out, outcomes, excluded, Path(folder) / options.part)
    print(f"{options.out / PARTS[options.part]}.md")
    return 0 if outcomes and all(outcome.status == "passed" for outcome in outcomes) else 1


def reasons(part: str) -> list[str]:
    """Return the reasons why some of a part cannot run here."""
    if _is_importable("megatron.core"):
        return []
    what = f"tests outside of {WITHOUT_MEGATRON}" if part == "kernels" else "rows j to n"
    return [f"{what}: megatron-core is not installed"]


def plan(folder: Path, part: str, *, has_megatron: bool) -> list[GpuStep]:
    """Return a part's steps in order, under eight minutes together; what they write goes to `folder`."""
    if part == "models":
        models = GpuStep(
            name="whole models at full shapes",
            command=(
                *(sys.executable, "-m", "benchmarks.models", "--device", "cuda"),
                *("--deadline-s", "360", "--out", str(folder / "models")),
            ),
            limit_s=460.0,
        )
        return [models] if has_megatron else []
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    tests = "tests" if has_megatron else WITHOUT_MEGATRON
    marked, kernels = folder / "marked.xml", folder / "kernels.xml"
    return [
        GpuStep(
            name="tests marked gpu",
            command=(*pytest, "-m", "gpu", f"--junitxml={marked}", tests),
            limit_s=80.0,
            result=marked,
        ),
        GpuStep(
            name="kernel tests on CUDA",
            command=(*pytest, "-m", "not gpu", f"--junitxml={kernels}", "tests/kernels"),
            limit_s=110.0,
            result=kernels,
        ),
        GpuStep(
            name="kernels at full shapes",
            command=(
                *(sys.executable, "-m", "benchmarks.kernels", "--device", "cuda"),
                *("--deadline-s", "230", "--out", str(folder / "kernels")),
            ),
            limit_s=280.0,
        ),
    ]


def run_step(step: GpuStep, environment: dict[str, str]) -> StepOutcome:
    """Return the outcome of a step; its output goes to this one's."""
    print(f"== {step.name}", flush=True)
    started = time.monotonic()
    # A group of its own, so that what the step started ends with it.
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=step.limit_s)
        status = "passed" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = f"stopped after {step.limit_s:.0f} s"
    outcome = StepOutcome(step.name, status, time.monotonic() - started)
    if step.result is not None and step.result.exists():
        outcome.counts, outcome.failed = read_junit(step.result)
        if status == "exit code 5" and not sum(outcome.counts.values()):
            outcome.status = "no test was selected"
    return outcome


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return tests by outcome and the names of those that failed."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failed


def write_report(
    folder: Path, outcomes: Sequence[StepOutcome], excluded: Sequence[str], measured: Path
) -> None:
    """Write a part's report from the outcomes and the benchmark's own, whose file has the part's name."""
    part = measured.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# On a CUDA device",
        "",
        f"Command: `python -m benchmarks.kernels.gpu --part {part}`. Device: {_device_name()}.",
        "",
    ]
    for outcome in outcomes:
        counts = ", ".join(f"{number} {name}" for name, number in outcome.counts.items())
        text = f"; {counts}" if counts else ""
        lines.append(f"- {outcome.name}: {outcome.status} in {outcome.seconds:.0f} s{text}")
        lines += [f"  - failed: {name}" for name in outcome.failed]
    lines += [f"- excluded: {reason}" for reason in excluded]
    markdown, data = measured.with_suffix(".md"), measured.with_suffix(".json")
    table = f"# {part.capitalize()}\n\nNot measured.\n"
    if markdown.exists():
        table = markdown.read_text(encoding="utf-8")
    (folder / f"{PARTS[part]}.md").write_text("\n".join(lines) + "\n\n#" + table, encoding="utf-8")
    content = {
        "device": _device_name(),
        "steps": [asdict(outcome) for outcome in outcomes],
        "excluded": list(excluded),
        part: json.loads(data.read_text(encoding="utf-8")) if data.exists() else None,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / f"{PARTS[part]}.json").write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def import_paths() -> Iterator[dict[str, str]]:
    """Return an environment in which `glm_rlhf` can be imported, installed or not."""
    environment = dict(os.environ)
    if _is_importable("glm_rlhf.kernels"):
        yield environment
        return
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "glm_rlhf"
        package.mkdir()
        for name in PACKAGES:
            (package / name).symlink_to(ROOT / name)
        paths = [folder, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        yield environment


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


if __name__ == "__main__":
    sys.exit(main())
