"""The doctor's report: alone, over ranks that answer, and over ranks that do not."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from machine_load import slowdown

from glm_rlhf.engine.config.tools import DoctorConfig, DoctorSection
from glm_rlhf.engine.health import doctor
from glm_rlhf.engine.health.connectivity import exchange, join, try_collectives, within
from glm_rlhf.engine.health.doctor import DoctorReport, differences, to_json, to_text
from glm_rlhf.engine.health.survey import ABSENT, PACKAGES, Collective, RankSurvey, Version, survey_rank
from glm_rlhf.parallel.fast_paths import FastPath, probe
from glm_rlhf.parallel.runtime.launch import read_launch


def _survey(rank: int, *, torch_version: str = "2.13.0", has_apex: bool = False) -> RankSurvey:
    adam = FastPath(
        purpose="Adam",
        name="apex FusedAdam",
        is_active=has_apex,
        reason="apex.optimizers.FusedAdam" if has_apex else "apex is not installed",
        used_instead="" if has_apex else "torch's AdamW",
    )
    te_adam = replace(
        adam, name="TE FusedAdam", is_active=False, reason="absent", used_instead=adam.used_instead
    )
    return RankSurvey(
        rank=rank,
        host=f"node{rank}",
        devices=("CPU, 2 cores, 8 GiB",),
        versions=(Version(name="python", version="3.11"), Version(name="torch", version=torch_version)),
        fast_paths=(te_adam, adam),
        collectives=(Collective(backend="gloo", is_ok=True, detail="0.5 ms for 4 KB"),),
    )


def _report(*surveys: RankSurvey, world_size: int = 2, silent: tuple[int, ...] = ()) -> DoctorReport:
    return DoctorReport(
        world_size=world_size,
        surveys=surveys,
        silent_ranks=silent,
        differences=tuple(differences(surveys)),
    )


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)


def test_alone_it_prints_versions_devices_and_fast_paths(alone: None, capsys: pytest.CaptureFixture):
    assert doctor.run(DoctorConfig()) == 0
    printed = capsys.readouterr().out
    for name in (*PACKAGES, "python", "CUDA", "NVIDIA driver", "NCCL"):
        assert re.search(rf"^  {name}  +\S", printed, re.MULTILINE), name
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", printed, re.MULTILINE)
    for path in probe():
        assert f"{path.name}" in printed
        assert path.reason in printed
    assert "all-reduce" not in printed


def test_alone_it_prints_one_json_object(alone: None, capsys: pytest.CaptureFixture):
    assert doctor.run(DoctorConfig(doctor=DoctorSection(json=True))) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["glm-rlhf"] != ABSENT
    assert {path["name"] for path in report["fast_paths"]} == {path.name for path in probe()}
    assert report["is_healthy"] is True
    assert len(report["ranks"]) == report["world_size"] == 1


@pytest.mark.slow
def test_under_torchrun_rank_0_reports_every_rank():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "glm_rlhf.engine", "doctor", "doctor.json=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)  # one object: one rank printed
    assert report["is_healthy"] is True
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        assert rank["host"]
        assert rank["devices"]
        assert {"backend": "gloo", "is_ok": True} == {
            key: rank["collectives"][0][key] for key in ("backend", "is_ok")
        }
    assert report["silent_ranks"] == report["differences"] == []


def test_a_rank_that_never_comes_is_named_in_time():
    store = dist.PrefixStore("test", dist.HashStore())
    start = time.monotonic()
    (gloo,) = try_collectives(store, rank=0, world_size=2, timeout_s=1.0)
    assert not gloo.is_ok
    assert gloo.detail
    own = replace(_survey(0), collectives=(gloo,))
    texts = exchange(store, own.to_json(), rank=0, world_size=2, timeout_s=0.2)
    assert time.monotonic() - start < 10 * slowdown()  # 2.5 s and 0.2 s allowed
    assert texts == [own.to_json(), None]
    assert not dist.is_initialized()

    report = _report(own, silent=(1,))
    assert not report.is_healthy
    assert "  rank 1: no answer" in to_text(report)
    assert re.search(r"gloo +rank 0 +FAILED ", to_text(report))


def test_each_rank_but_the_first_only_leaves_its_text():
    store = dist.HashStore()
    assert exchange(store, "mine", rank=1, world_size=2, timeout_s=0.1) == []
    assert exchange(store, "first", rank=0, world_size=2, timeout_s=0.1) == ["first", "mine"]


def test_a_check_that_hangs_is_left_behind():
    release = threading.Event()
    outcome = within(lambda: str(release.wait()), backend="nccl", timeout_s=0.05)
    release.set()
    assert outcome == Collective(backend="nccl", is_ok=False, detail="no answer in 0.05 s")


def test_a_check_that_fails_says_why():
    def fail() -> str:
        raise RuntimeError("Connection reset\n  by peer")

    outcome = within(fail, backend="gloo", timeout_s=10)
    assert outcome == Collective(backend="gloo", is_ok=False, detail="Connection reset by peer")


def test_a_launch_without_a_meeting_place_is_the_callers_fault(monkeypatch: pytest.MonkeyPatch, alone: None):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        join(read_launch(), 0.1)


def test_an_unhealthy_launch_returns_1(
    monkeypatch: pytest.MonkeyPatch, alone: None, capsys: pytest.CaptureFixture
):
    failed = replace(_survey(1), collectives=(Collective(backend="gloo", is_ok=False, detail="refused"),))
    for report, code in ((_report(_survey(0), _survey(1)), 0), (_report(_survey(0), failed), 1), (None, 0)):
        monkeypatch.setattr(doctor, "diagnose", lambda _, report=report, **kwargs: report)
        assert doctor.run(DoctorConfig()) == code
    assert re.search(r"gloo +rank 1 +FAILED +refused", capsys.readouterr().out)


def test_ranks_that_differ_are_named():
    report = _report(_survey(0), _survey(1, torch_version="2.12.0", has_apex=True))
    assert report.differences == (
        "rank 1 on node1: torch 2.12.0, rank 0 has 2.13.0",
        "rank 1 on node1: apex FusedAdam is active (apex.optimizers.FusedAdam)",
    )
    for difference in report.differences:
        assert difference in to_text(report)
    assert json.loads(to_json(report))["differences"] == list(report.differences)
    assert _report(_survey(0), _survey(1)).differences == ()


def test_the_tables_are_aligned_and_say_what_is_used():
    text = to_text(_report(_survey(0, has_apex=True), _survey(1, has_apex=True)))
    assert "  python  3.11\n  torch   2.13.0\n" in text
    assert "  Adam: apex FusedAdam\n    no   TE FusedAdam    absent\n    yes  apex FusedAdam  apex." in text
    assert "  rank 0  node0  CPU, 2 cores, 8 GiB\n  rank 1  node1  CPU, 2 cores, 8 GiB\n" in text
    assert "all-reduce over 2 ranks\n  gloo  rank 0  ok  0.5 ms for 4 KB\n" in text
    assert "  Adam: torch's AdamW\n" in to_text(_report(_survey(0), _survey(1)))


def test_a_survey_survives_its_json():
    for survey in (_survey(3), survey_rank(rank=1, local_rank=0)):
        assert RankSurvey.from_json(survey.to_json()) == survey
