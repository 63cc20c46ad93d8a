"""The calibration of a reward model: accuracy by confidence as a table, and as a plot with matplotlib."""

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from glm_rlhf.engine.objectives.pair_statistics import CalibrationBin
from glm_rlhf.parallel.storage.durable_io import replace_file, replace_text


def write_calibration(folder: str | Path, step: int, table: Sequence[CalibrationBin]) -> None:
    """Write `<folder>/step_N.json`, a list of bins, and `step_N.png` if matplotlib is installed.

    Raises:
        OSError: the folder cannot be created or written.
    """
    folder = Path(folder)
    rows = [asdict(row) for row in table]
    replace_text(folder / f"step_{step}.json", json.dumps(rows, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        _draw(folder / f"step_{step}.png", step, table)


def _draw(path: Path, step: int, table: Sequence[CalibrationBin]) -> None:
    from matplotlib.figure import Figure  # an extra; slow to import

    filled = [row for row in table if row.num_pairs]
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1.0], [0.5, 1.0], color="0.6", linestyle="--", label="perfect")
    axes.bar(
        [(row.start + row.end) / 2 for row in filled],
        [row.accuracy for row in filled],
        width=[0.9 * (row.end - row.start) for row in filled],
        color="tab:blue",
        label="pairs",
    )
    for row in filled:
        axes.annotate(str(row.num_pairs), ((row.start + row.end) / 2, row.accuracy), ha="center", va="bottom")
    axes.set(xlim=(0.5, 1.0), ylim=(0.0, 1.05), xlabel="confidence", ylabel="accuracy", title=f"step {step}")
    axes.legend(loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    replace_file(path, image.getvalue())
