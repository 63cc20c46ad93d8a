"""The calibration table as a file, and as a picture where matplotlib is installed."""

import json
import math

import pytest

from glm_rlhf.engine.objectives.pair_statistics import CalibrationBin
from glm_rlhf.engine.observe.calibration import write_calibration

TABLE = [
    CalibrationBin(start=0.5, end=0.75, num_pairs=4, mean_confidence=0.6, accuracy=0.5),
    CalibrationBin(start=0.75, end=1.0, num_pairs=0, mean_confidence=None, accuracy=None),
]


def test_the_table_is_a_list_of_bins(tmp_path):
    write_calibration(tmp_path / "calibration", 3, TABLE)
    rows = json.loads((tmp_path / "calibration" / "step_3.json").read_text())
    assert rows[0] == {"start": 0.5, "end": 0.75, "num_pairs": 4, "mean_confidence": 0.6, "accuracy": 0.5}
    assert rows[1]["accuracy"] is None


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    write_calibration(tmp_path, 3, TABLE)
    header = (tmp_path / "step_3.png").read_bytes()[:24]
    width = int.from_bytes(header[16:20], "big")
    assert math.isclose(width, 4.5 * 120, abs_tol=2)
