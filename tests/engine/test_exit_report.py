"""Reports of failed commands: one rank speaks, and torchrun's summary has the sentence instead of a stack."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from glm_rlhf.engine import cli
from glm_rlhf.engine.cli import Command, main
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks

SENTENCE = "glm-rlhf doctor: the file is missing"


def failing_command() -> Command:
    return Command(name="doctor", summary="s", root="config.tools:DoctorConfig", function="failing:run")


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Return a function that runs a failing command as one rank under torchrun: code, stderr, error file."""

    def run_as(rank: int, error: BaseException, *, host: int = 0) -> tuple[int, str, dict]:
        def run(_config: object) -> None:
            raise error

        monkeypatch.setitem(sys.modules, "failing", types.SimpleNamespace(run=run))
        monkeypatch.setattr(cli, "COMMANDS", (failing_command(),))
        monkeypatch.setattr("glm_rlhf.engine.exit_report._num_reports", 0)  # of a process of its own
        folder = tmp_path / f"host_{host}" / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        for name, value in {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": rank % 4}.items():
            monkeypatch.setenv(name, str(value))
        code = main(["doctor"])
        return code, capsys.readouterr().err, json.loads((folder / "error.json").read_text())

    return run_as


def test_the_same_fault_on_all_ranks_is_said_once_per_host(fail):
    answers = [fail(rank, ValueError("the file\nis missing"), host=rank // 4) for rank in (2, 1, 3, 0, 5, 4)]
    assert [code for code, *_ in answers] == [2] * 6
    assert [said for _, said, _ in answers] == [
        *(f"[rank 2] {SENTENCE}\n", "", "", ""),
        *(f"[rank 5] {SENTENCE}\n", ""),
    ]


def test_different_faults_are_said_with_their_ranks(fail):
    assert fail(0, ValueError("the file is missing"))[1] == f"[rank 0] {SENTENCE}\n"
    assert fail(1, ValueError("another"))[1] == "[rank 1] glm-rlhf doctor: another\n"
    missing = FileNotFoundError(2, "No such file or directory", "d.jsonl")
    assert fail(2, missing)[1] == "[rank 2] glm-rlhf doctor: d.jsonl: No such file or directory\n"


def test_torchruns_summary_shows_the_sentence(fail, tmp_path):
    *_, content = fail(1, ValueError("the file is missing"))
    assert content["message"]["message"] == SENTENCE
    file = tmp_path / "host_0" / "attempt_0" / "1" / "error.json"
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    lines = str(ChildFailedError("glm_rlhf.engine", {1: failure})).splitlines()
    assert f"  traceback : {SENTENCE}" in lines
    assert len(lines) < 20


def test_a_bug_keeps_its_traceback_in_torchruns_summary(fail, tmp_path):
    with pytest.raises(KeyError):
        fail(3, KeyError("bug"))
    file = tmp_path / "host_0" / "attempt_0" / "3" / "error.json"
    callstack = json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"]
    assert callstack.startswith("Traceback")
    assert "KeyError: 'bug'" in callstack


def failing_ranks(faults: dict[int, str]) -> tuple[int, str]:
    """Return exit code and stderr of this rank, with an own exception on some ranks."""
    import contextlib
    import io
    import os

    import torch.distributed as dist

    rank = dist.get_rank()

    def run(_config: object) -> None:
        with raise_on_all_ranks("reading"):
            if rank in faults:
                raise ValueError(faults[rank])

    sys.modules["failing"] = types.SimpleNamespace(run=run)
    commands, cli.COMMANDS = cli.COMMANDS, (failing_command(),)
    launch = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank)}
    os.environ |= launch
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            return main(["doctor"]), stderr.getvalue()
    finally:
        cli.COMMANDS = commands
        for name in launch:
            del os.environ[name]


def test_ranks_without_the_fault_are_silent(ranks):
    said = ranks.run(failing_ranks, {2: "bad shard"})
    assert said == [(2, ""), (2, ""), (2, "[rank 2] glm-rlhf doctor: bad shard\n"), (2, "")]
    said = ranks.run(failing_ranks, {1: "no room", 2: "no room", 3: "bad shard"})
    sentences = [
        f"[rank {rank}] glm-rlhf doctor: {fault}\n" for rank, fault in ((1, "no room"), (3, "bad shard"))
    ]
    assert said == [(2, ""), (2, sentences[0]), (2, ""), (2, sentences[1])]


def test_a_users_fault_under_torchrun_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        "-m",
        "glm_rlhf.engine",
        "score",
        "model.path=nowhere",
        "data.path=d",
        f"run.output={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr  # torchrun's own
    said, _, summary = done.stderr.partition("Traceback (most recent call last)")
    sentence = "glm-rlhf score: nowhere does not exist; give the path of a Hugging Face model folder"
    assert said.count(sentence) == 1, done.stderr
    assert "glm_rlhf/" not in summary, "a stack of the ranks"
    assert f"traceback : {sentence}" in summary
    assert "exitcode  : 2" in summary
    assert len(summary.splitlines()) < 60
