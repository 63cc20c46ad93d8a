"""Rows j to n: the phase switch, decode steps, training and an iteration of PPO, on whole models.

python -m benchmarks.models                         on CUDA at the shapes of 6B and 9B, else small
python -m benchmarks.models --shapes 6B --rows j,k  some of them
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.harness.command import DEVICE, device_of, parse
from benchmarks.harness.fresh_process import in_fresh_process
from benchmarks.models.groups import GROUPS, LATE, measured_group, unmeasured_rows
from benchmarks.models.sizes import PRESETS, ModelSizes, full_sizes, small_sizes
from benchmarks.models.verdict import report_of
from glm_rlhf.engine.bench.machine import MachineRates, measured_rates
from glm_rlhf.engine.bench.report import Row, write

LETTERS = "".join(GROUPS)
_OPTIONS = {
    "device": DEVICE,
    "shapes": (",".join(PRESETS), "on CUDA"),
    "rows": (",".join(LETTERS), "letters"),
    "deadline_s": (1e9, "seconds after which nothing further is begun"),
    "no_peer": (False, "exclude transformers"),
    "threads": (1, "of the CPU"),
    "out": (None, "report, without its suffix", Path),
}


def main(arguments: Sequence[str] | None = None, small: ModelSizes | None = None) -> int:
    """Measure, write the report and return the exit status: 1 where a row has no figure, 2 for wrong options.

    Args:
        arguments: of the command line.
        small: the shape on a CPU; None for `small_sizes`.
    """
    options = parse(arguments, doc=__doc__, options=_OPTIONS)
    shapes, letters = options.shapes.split(","), options.rows.split(",")
    if not set(shapes) <= set(PRESETS) or not set(letters) <= set(LETTERS):
        print(
            f"--shapes takes {','.join(PRESETS)}, --rows {','.join(LETTERS)}, separated by commas; given are "
            f"{options.shapes} and {options.rows}",
            file=sys.stderr,
        )
        return 2
    device = device_of(options.device)
    is_cuda = device.type == "cuda"
    deadline = time.time() + options.deadline_s
    out = options.out or RESULTS / f"model_rows_{device.type}"
    if is_cuda:
        # Each group in a process of its own: what one leaves, or a fault, is not the next one's.
        rates = in_fresh_process(measured_rates, device)
    else:
        torch.set_num_threads(options.threads)
        rates = measured_rates(device)
    rows: list[Row] = []
    for sizes in [full_sizes(shape) for shape in shapes] if is_cuda else [small or small_sizes()]:
        for group in GROUPS:
            wanted = "".join(letter for letter in group if letter in letters)
            if not wanted:
                continue
            rows += _rows(sizes, wanted, rates, is_cuda, not options.no_peer, deadline)
            write(report_of(rows, device, rates), out)  # a run that is cut short leaves what it measured
    print(f"{out}.md")
    return int(any(row.entries[0].timing is None for row in rows))


def _rows(
    sizes: ModelSizes, letters: str, rates: MachineRates, is_cuda: bool, has_peer: bool, deadline: float
) -> list[Row]:
    if time.time() > deadline:
        return unmeasured_rows(sizes, letters, LATE, rates)
    print(f"{sizes.name} {letters} …", flush=True)
    if not is_cuda:
        return measured_group(sizes, letters, rates, has_peer, deadline)
    try:
        return in_fresh_process(measured_group, sizes, letters, rates, has_peer, deadline)
    except RuntimeError as error:  # its process died, or nothing of the group could be begun
        return unmeasured_rows(sizes, letters, f"failed: {str(error)[:200]}", rates)


if __name__ == "__main__":
    sys.exit(main())
