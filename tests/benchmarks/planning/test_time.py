"""Predicted phases are those that are measured."""

import pytest

from benchmarks.planning import time
from glm_rlhf.engine.cost.hardware import GPUS, assumed_rates


@pytest.mark.parametrize("axes", time.LAYOUTS, ids=str)
def test_every_layout_of_the_comparison_can_be_predicted(axes):
    assumed = assumed_rates(GPUS["h100"], network_bytes_per_s=50e9)
    predicted = time.predict(axes, assumed, 2)
    assert predicted.keys() == {"generate", "score", "update"}
    assert all(seconds > 0 for seconds in predicted.values())
