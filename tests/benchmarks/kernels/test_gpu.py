"""The GPU run says what it would do, leaves out what it cannot, and fails where there is no device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "no CUDA device is at hand, so nothing was run or written\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_dry_run_lists_the_steps_within_eight_minutes(tmp_path, capsys, part):
    assert gpu.main(["--dry-run", "--part", part]) == 0
    printed = capsys.readouterr().out
    steps = gpu.plan(tmp_path, part, has_megatron=True)
    assert sum(step.limit_s for step in steps) <= 480
    assert all(step.name in printed for step in steps)


def test_without_megatron_its_tests_are_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_is_importable", lambda name: name != "megatron.core")
    assert gpu.reasons("kernels") == ["tests outside of tests/kernels: megatron-core is not installed"]
    marked, kernels, _ = gpu.plan(tmp_path, "kernels", has_megatron=False)
    assert marked.command[-1] == "tests/kernels"  # elsewhere files fail to import, and end the run
    assert "tests/kernels" in kernels.command
    assert gpu.reasons("models") == ["rows j to n: megatron-core is not installed"]
    assert gpu.plan(tmp_path, "models", has_megatron=False) == []


def test_the_package_can_be_imported_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(gpu, "_is_importable", lambda name: False)
    with gpu.import_paths() as environment:
        # -S: without the installed packages, and so without the installed form of this one
        script = "import importlib.util as u; print(u.find_spec('glm_rlhf.kernels').origin)"
        command = [sys.executable, "-S", "-c", script]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert Path(output.strip()).samefile(gpu.ROOT / "kernels" / "__init__.py")


def test_a_step_that_outlasts_its_limit_is_stopped():
    endless = (sys.executable, "-S", "-c", "import threading; threading.Event().wait()")
    outcome = gpu.run_step(gpu.GpuStep(name="endless", command=endless, limit_s=1.0), {})
    assert outcome.status == "stopped after 1 s"


def test_the_report_holds_tests_and_benchmark(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="a" name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    command = (sys.executable, "-S", "-c", "raise SystemExit(1)")
    outcome = gpu.run_step(gpu.GpuStep(name="tests", command=command, limit_s=60.0, result=junit), {})
    assert outcome.status == "exit code 1"
    (tmp_path / "kernels.md").write_text("# Kernels, CUDA\n")
    (tmp_path / "kernels.json").write_text('{"title": "Kernels, CUDA"}')
    gpu.write_report(tmp_path / "out", [outcome], ["something: a reason"], tmp_path / "kernels")
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "  - failed: a::bad" in text
    assert "excluded: something: a reason" in text
    assert "\n## Kernels, CUDA\n" in text
    data = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert data["steps"][0]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert data["kernels"]["title"] == "Kernels, CUDA"


def test_a_benchmark_that_left_no_report_is_said_to_be_missing(tmp_path):
    gpu.write_report(tmp_path, [], [], tmp_path / "models")
    assert "## Models\n\nNot measured." in (tmp_path / "gpu_models.md").read_text()
    assert json.loads((tmp_path / "gpu_models.json").read_text())["models"] is None
