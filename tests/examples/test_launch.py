"""The launch scripts: sound shell, and the commands that they say they would run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"


def dry_run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        env={**os.environ, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_script_is_sound():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    scripts = [path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")]
    found = subprocess.run([checker, *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_one_node():
    said = dry_run("one_node.sh", "ppo", "x.yaml", "train.steps=2", GPUS="4", RESTARTS="3")
    assert (
        said.stdout.split()
        == (
            "torchrun --standalone --nproc-per-node=4 --max-restarts=3 "
            "-m glm_rlhf.engine ppo x.yaml train.steps=2"
        ).split()
    )


def test_each_of_several_nodes():
    said = dry_run("each_node.sh", "sft", "x.yaml", NODES="8", HOST="node0", PORT="1234", RUN_ID="7")
    assert (
        said.stdout.split()
        == (
            "torchrun --nnodes=8 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d "
            "--rdzv-endpoint=node0:1234 --rdzv-id=7 -m glm_rlhf.engine sft x.yaml"
        ).split()
    )


@pytest.mark.parametrize("script, arguments", [("one_node.sh", ()), ("each_node.sh", ("ppo",))])
def test_what_is_missing_is_said(script, arguments):
    said = dry_run(script, *arguments)
    assert said.returncode == 2
    assert said.stderr.startswith("usage: ")


def test_a_slurm_job_gives_its_nodes_one_rendezvous(tmp_path):
    """Slurm's own commands are played: one names the nodes, the other runs the script on this machine."""
    for name, body in (
        ("scontrol", 'echo "node3"; echo "node4"'),
        ("srun", 'echo "srun $1"; shift; exec "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    said = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "ppo", "x.yaml"],
        cwd=LAUNCH.parents[1],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "DRY_RUN": "1",
            "SLURM_JOB_NODELIST": "node[3-4]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_ID": "123456",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = said.stdout.splitlines()
    assert first == "srun --kill-on-bad-exit=1"
    assert "--nnodes=2" in second
    assert "--rdzv-endpoint=node3:23456 --rdzv-id=123456" in second
