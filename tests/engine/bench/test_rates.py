"""Measured rates are a file that `plan` reads."""

import json
from dataclasses import asdict, fields

import pytest
import torch

from glm_rlhf.engine.bench import rates
from glm_rlhf.engine.bench.machine import MachineRates as DeviceRates
from glm_rlhf.engine.cost.hardware import read_rates
from glm_rlhf.parallel.spec.presets import preset


@pytest.fixture
def device_rates(monkeypatch):
    """Stands for two seconds of copies and products."""
    device = DeviceRates(bytes_per_s=1e10, flop_per_s=1e10, source="a test's")
    monkeypatch.setattr(rates, "measured_rates", lambda _device: device)


def test_measured_rates_are_read_by_plan(tmp_path, device_rates):
    size = rates.Size(tokens=128, length=32, batch=4, dtype=torch.float32, repetitions=1)
    found = rates.rates_of(preset("tiny-glm"), size)
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(asdict(found)))
    assert read_rates(path) == found
    assert found.bytes_per_s == 1e10
    assert all(getattr(found, field.name) > 0 for field in fields(found) if field.name != "source")
    assert "measured" in found.source
