"""Rows a to i of the kernels: ours against torch eager, torch.compile and the peers that are installed.

python -m benchmarks.kernels                       every row, on CUDA at full shapes, else at small ones
python -m benchmarks.kernels --rows a1 a2          some rows
python -m benchmarks.kernels --list                what would be measured
"""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.harness.command import DEVICE, device_of, finish, parse
from glm_rlhf.engine.bench.harness import Entry
from glm_rlhf.engine.bench.kernel_rows.case import Case
from glm_rlhf.engine.bench.kernel_rows.table import full_cases, small_cases
from glm_rlhf.engine.bench.machine import H200, MachineRates, description, measured_rates
from glm_rlhf.engine.bench.parts.kernels import is_not_compiled, measured_case, row_of
from glm_rlhf.engine.bench.report import Report, Row, write

_OPTIONS = {
    "device": DEVICE,
    "rows": ([], "such as a1 e2; all where there are none", str),
    "budget_s": (1.0, "seconds of timed runs per row"),
    "deadline_s": (1e9, "seconds after which no further row begins; a third of it in, nothing is compiled"),
    "threads": (1, "of the CPU"),
    "no_compile": (False, "exclude torch.compile"),
    "list": (False, "print the rows and end"),
    "out": (None, "report, without its suffix", Path),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and return the exit status: 1 where ours was wrong, failed or not timed."""
    options = parse(arguments, doc=__doc__, options=_OPTIONS)
    device = device_of(options.device)
    cases = full_cases() if device.type == "cuda" else small_cases()
    cases = [case for case in cases if not options.rows or case.row in options.rows]
    if options.list:
        for case in cases:
            print(f"{case.row:3} {case.model:10} {case.what}; {case.shape}")
        return 0
    if not cases:
        print(f"there is no row {' '.join(options.rows)}; --list shows the rows", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    rates = measured_rates(device)
    deadline = time.monotonic() + options.deadline_s
    out = options.out or RESULTS / f"kernels_{device.type}"
    is_whole_cpu_run = device.type == "cpu" and not options.rows
    rows = []
    for case in cases:
        rows.append(_measured(case, device, rates, options, deadline))
        print(_line(rows[-1]), flush=True)
        if device.type == "cuda":  # a run that is cut short leaves what it measured
            write(report(rows, device, rates, lists_full_shapes=False), out)
    failed = any(row.entries[0].timing is None for row in rows)
    return finish(report(rows, device, rates, lists_full_shapes=is_whole_cpu_run), out, has_failed=failed)


def _measured(
    case: Case, device: torch.device, rates: MachineRates, options: Namespace, deadline: float
) -> Row:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        late = Entry(name="ours", status="not measured: the time was used up")
        return row_of(case, rates, [late], _command(case, device))
    is_late = left_s < options.deadline_s * 2 / 3
    return measured_case(
        case,
        device,
        rates,
        budget_s=options.budget_s,
        command=_command(case, device),
        keeps=is_not_compiled if options.no_compile or is_late else lambda _contender: True,
    )


def _command(case: Case, device: torch.device) -> str:
    return f"python -m benchmarks.kernels --device {device.type} --rows {case.row}"


def report(
    rows: Sequence[Row], device: torch.device, rates: MachineRates, *, lists_full_shapes: bool
) -> Report:
    """Return the report; on a CPU the rows at full shapes follow with empty cells."""
    notes = [
        f"rates behind `limit ms`: {rates.source}",
        "every contender's answer is checked on the same inputs before it is timed",
        "a2, a3 and b2: ours computes the entropy too, which the others are spared",
    ]
    if device.type == "cuda":
        notes.append(
            f"targets are for an {H200.source}; device time by events, cache flushed before each run"
        )
    else:
        notes += [
            "on a CPU `ours` is the fp32 torch reference that runs where there is no CUDA, not the Triton "
            "kernels: these rows say what a CPU user gets, and nothing about a GPU",
            f"torch uses {torch.get_num_threads()} thread(s)",
        ]
    if lists_full_shapes:
        notes.append(
            "rows marked 6B or 9B are the full shapes on CUDA: their limit is that of an "
            f"{H200.source}, their other cells are empty because no CUDA device was at hand"
        )
        cuda = torch.device("cuda")
        rows = [*rows, *(row_of(case, H200, (), _command(case, cuda)) for case in full_cases())]
    return Report(
        title=f"Kernels, {device.type.upper()}",
        claim=verdict(rows),
        machine=description(device),
        rows=rows,
        notes=notes,
    )


def verdict(rows: Sequence[Row]) -> str:
    """Return the speed of ours relative to each row's eager torch and to the best of all others."""
    compared, untimed = [], []
    for row in rows:
        if not row.entries:
            continue
        engine, *others = row.entries
        name = f"{row.row} ({row.shape.partition(':')[0]})"
        timed = [entry for entry in others if entry.timing is not None and not entry.name.startswith("ours")]
        if engine.timing is None:
            untimed.append(f"{name} {engine.status}")
        elif timed:
            eager, best = timed[0], min(timed, key=lambda entry: entry.timing.median_s)
            text = f"{name} {_ratio(eager, engine):.2f} × {eager.name}"
            if best is not eager:
                text += f", {_ratio(best, engine):.2f} × {best.name}"
            compared.append(text)
    parts = [
        f"Ours is so many times as fast as the first and, where another, the best: {'; '.join(compared)}."
    ]
    parts += [f"Not timed: {'; '.join(untimed)}."] if untimed else []
    return " ".join(parts)


def _ratio(other: Entry, engine: Entry) -> float:
    return other.timing.median_s / engine.timing.median_s


def _line(row: Row) -> str:
    texts = []
    for entry in row.entries:
        timing = entry.timing
        texts.append(f"{entry.name} {entry.status if timing is None else f'{timing.median_s * 1e3:.3g} ms'}")
    return f"{row.row} {row.shape}: {'; '.join(texts)}"


if __name__ == "__main__":
    sys.exit(main())
