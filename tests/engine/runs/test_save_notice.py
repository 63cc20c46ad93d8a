"""The line at the start of a run whose save outlasts torchrun's patience."""

from types import SimpleNamespace

import pytest
import torch

from glm_rlhf.engine.runs.save_notice import SHUTDOWN_VARIABLE, log_long_save, shutdown_s
from glm_rlhf.parallel.spec.presets import preset

MAIN = SimpleNamespace(is_main_rank=True)


def _states(name: str) -> dict[str, SimpleNamespace]:
    chunk = SimpleNamespace(
        glm=preset(name), role="policy", config=SimpleNamespace(params_dtype=torch.bfloat16)
    )
    return {"policy": SimpleNamespace(bare_chunks=[chunk])}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.delenv(SHUTDOWN_VARIABLE, raising=False)
    return monkeypatch


def test_a_save_of_more_than_30_s_is_announced_with_a_way_out(torchrun, capsys):
    log_long_save(_states("glm-4-9b"), MAIN)
    said = capsys.readouterr().err
    assert (
        "a checkpoint has about 131.6 GB and is expected to take 132 s, at 1 GB/s: longer than the 30 s"
        in said
    )
    assert f"{SHUTDOWN_VARIABLE}=270, or send SIGUSR1 to one rank" in said
    log_long_save(_states("glm-4-9b"), SimpleNamespace(is_main_rank=False))
    assert capsys.readouterr().err == ""


def test_enough_time_is_not_mentioned(torchrun, capsys):
    torchrun.setenv(SHUTDOWN_VARIABLE, "200")
    assert shutdown_s() == 200.0
    log_long_save(_states("glm-4-9b"), MAIN)
    torchrun.delenv("TORCHELASTIC_RUN_ID")
    torchrun.delenv(SHUTDOWN_VARIABLE)
    log_long_save(_states("glm-4-9b"), MAIN)
    assert capsys.readouterr().err == ""


def test_a_torch_that_does_not_read_the_variable_waits_30_s(torchrun):
    torchrun.setenv(SHUTDOWN_VARIABLE, "200")
    old = SimpleNamespace(__dataclass_fields__={})
    torchrun.setattr("torch.distributed.launcher.api.LaunchConfig", old)
    assert shutdown_s() == 30.0
