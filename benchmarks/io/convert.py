"""Import and export of a synthetic 2 GB checkpoint, against safetensors and transformers.

python -m benchmarks.io.convert
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import RESULTS
from benchmarks.harness.fresh_process import PreparedProcesses
from benchmarks.io import contenders
from benchmarks.io.synthetic_checkpoint import config_of_size, write_checkpoint
from glm_rlhf.engine.bench.harness import Entry, Ratio, Timing, summary
from glm_rlhf.engine.bench.machine import MachineRates, description, measured_rates
from glm_rlhf.engine.bench.report import Report, Row, write

MEMORY_COLUMN = "peak MB above the tensors"
MEMORY_FOLDER = Path("/dev/shm")
UNSYNCED = ", without fsync"
# Source and target, in multiples of the checkpoint, with something to spare.
ROOM = 2.5
# What every process has imported before it is measured.
PRELOADED = ("transformers", "transformers.models.glm.modeling_glm", "benchmarks.io.contenders")


@dataclass(slots=True)
class ConvertTask:
    """A row: contenders that do the same, by name."""

    row: str
    what: str
    contenders: dict[str, Callable[..., contenders.ContenderOutcome]]
    outcomes: dict[str, list[contenders.ContenderOutcome]] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and return the exit status: 1 where bytes differ, 2 without the room."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, default 2")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every contender, in turns, default 3")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the checkpoint is made; default the folder for temporary files, on a disk so that fsync "
        "counts;\n/dev/shm shows what the code costs without one",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "convert_io_cpu", help="report, without its suffix"
    )
    options = parser.parse_args(arguments)
    parent = options.folder
    if not _has_room(parent, options.gigabytes):
        print(
            f"{parent} has no room for {ROOM * options.gigabytes:.1f} GB: free some, or name another folder "
            "with --folder",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        config = config_of_size(options.gigabytes * 1e9)
        num_bytes = write_checkpoint(Path(folder) / "source", config)
        tasks = measured(Path(folder), options.rounds)
    command = f"python -m benchmarks.io.convert --gigabytes {options.gigabytes:g} --rounds {options.rounds}"
    rates = measured_rates(torch.device("cpu"))
    rows = [_row(task, command, rates) for task in tasks]
    write(report(rows, num_bytes, config.num_layers, parent, rates), options.out)
    print(f"{options.out}.md: {verdict(rows)}")
    return 1 if any(entry.status for row in rows for entry in row.entries) else 0


def _has_room(folder: Path, gigabytes: float) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free > ROOM * 1e9 * gigabytes


def measured(folder: Path, rounds: int) -> list[ConvertTask]:
    """Return the tasks with the outcomes of all contenders, taken in turns of a new order each."""
    tasks = [
        ConvertTask(
            "import, tp 1",
            "whole checkpoint into parameters that exist",
            {
                "ours": contenders.import_ours,
                "safetensors load_file + copy": contenders.import_safetensors,
                "transformers from_pretrained": contenders.import_transformers,
                "plain read of the files": contenders.read_plainly,
            },
        ),
        ConvertTask(
            "import, tp 4",
            "the first of 4 ranks: its slices into parameters that exist",
            {
                "ours": contenders.import_ours_of_4,
                "safetensors get_slice + copy": contenders.import_slices_of_4,
            },
        ),
        ConvertTask(
            "export, tp 1",
            "whole parameters into a new folder, on disk",
            {
                "ours": contenders.export_ours,
                "safetensors save_file + fsync": contenders.export_safetensors,
                f"ours{UNSYNCED}": contenders.export_ours_unsynced,
                f"safetensors save_file{UNSYNCED}": contenders.export_safetensors_unsynced,
                "transformers save_pretrained": contenders.export_transformers,
                "plain write of as many bytes": contenders.write_plainly,
            },
        ),
        ConvertTask(
            "export, tp 4",
            "the shards of 4 ranks, joined, into a new folder, on disk",
            {"ours": contenders.export_ours_of_4},
        ),
    ]
    processes = PreparedProcesses(PRELOADED)
    processes.run(
        contenders.read_plainly, folder, False
    )  # warms the page cache: every import reads from memory
    for task in tasks:
        task.outcomes = {name: [] for name in task.contenders}
    shuffler = random.Random(0)  # none profits from what the one before it leaves, such as warm free memory
    for index in range(rounds):
        for task in tasks:
            for name in shuffler.sample(list(task.contenders), len(task.contenders)):
                outcome = processes.run(task.contenders[name], folder, index == 0)
                task.outcomes[name].append(outcome)
                shutil.rmtree(folder / "target", ignore_errors=True)
                os.sync()  # what an earlier one left to write is not the next one's
    return tasks


def report(rows: Sequence[Row], num_bytes: int, num_layers: int, folder: Path, rates: MachineRates) -> Report:
    """Return the report of all rows; `folder` is where the files lay."""
    in_memory = folder == MEMORY_FOLDER
    return Report(
        title="Hugging Face folders in and out, CPU",
        claim=verdict(rows),
        machine=description(torch.device("cpu")),
        rows=rows,
        notes=(
            f"checkpoint: GLM of {num_layers} layers, hidden 2048, bf16, {num_bytes / 1e9:.3f} GB in files "
            "of 0.5 GB, random, made for the run and deleted after it",
            "each run is a fresh process; runs are taken in turns, in a new order each",
            "files lie in memory (tmpfs): the figures say what the code costs, not a disk"
            if in_memory
            else "files lie on a disk: imports read from the page cache; exports end with fsync of files and "
            f"folder, but for those `{UNSYNCED.removeprefix(', ')}`, whose files the system writes later",
            f"`{MEMORY_COLUMN}`: peak resident memory during the run less what was resident before it; for "
            "transformers less the model, too, which it allocates itself. Pages of a mapped file count",
            f"limit: every byte is read and written once; {rates.source}",
            "checked in the first round: every byte that was imported or exported equals the source's",
        ),
    )


def verdict(rows: Sequence[Row]) -> str:
    """Return ours against the best of the others, in one sentence a row."""
    parts = []
    for row in rows:
        engine, *others = row.entries
        others = [e for e in others if e.timing is not None and not e.name.startswith(("plain", "ours"))]
        others = [e for e in others if not e.name.endswith(UNSYNCED)]
        if engine.timing is None:
            parts.append(f"{row.row}: {engine.status}.")
            continue
        speed = row.work[0] / engine.timing.median_s
        memory = f"{engine.figures[MEMORY_COLUMN]:.0f} MB above the tensors"
        text = f"{row.row}: {speed:.2f} GB/s, {memory}"
        if others:
            best = min(others, key=lambda entry: entry.timing.median_s)
            ratio = best.timing.median_s / engine.timing.median_s
            text += f", {ratio:.2f} × as fast as {best.name} ({best.figures[MEMORY_COLUMN]:.0f} MB)"
        parts.append(f"{text}.")
    return " ".join(parts)


def _timing(
    outcomes: Sequence[contenders.ContenderOutcome],
    engine_outcomes: Sequence[contenders.ContenderOutcome] | None,
) -> Timing:
    timing = summary([outcome.seconds for outcome in outcomes])
    if engine_outcomes is None:
        return timing
    turns = summary(
        [one.seconds / first.seconds for one, first in zip(outcomes, engine_outcomes, strict=True)]
    )
    return replace(timing, ratio=Ratio(median=turns.median_s, low=turns.low_s, high=turns.high_s))


def _row(task: ConvertTask, command: str, rates: MachineRates) -> Row:
    entries = []
    for name, outcomes in task.outcomes.items():
        is_right = all(outcome.is_right for outcome in outcomes)
        entries.append(
            Entry(
                name=name,
                timing=_timing(outcomes, None if name == "ours" else task.outcomes["ours"])
                if is_right
                else None,
                figures={MEMORY_COLUMN: median(outcome.above_bytes for outcome in outcomes) / 1e6},
                status="" if is_right else "wrong: bytes differ from the source's",
            )
        )
    work_bytes = task.outcomes["ours"][0].work_bytes
    return Row(
        row=task.row,
        what=task.what,
        shape=f"{work_bytes / 1e9:.3f} GB, bf16",
        command=command,
        entries=entries,
        limit_s=rates.limit_s(2.0 * work_bytes, 0.0),
        work=(work_bytes / 1e9, "GB"),
    )


if __name__ == "__main__":
    sys.exit(main())
