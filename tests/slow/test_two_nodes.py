"""Two nodes, played by two torchrun agents on this machine: their ranks meet."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"


def both_nodes(command: list[str], environment: dict[str, str]) -> list[str]:
    """What two agents say that are started alike."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    agents = [
        subprocess.Popen(
            command,
            env=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=LAUNCH.parents[1],
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    return said


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("", 0))
        return str(one.getsockname()[1])


def test_the_script_that_each_node_runs():
    said = both_nodes(
        [str(LAUNCH / "each_node.sh"), "doctor"],
        {"NODES": "2", "GPUS": "2", "HOST": "localhost", "PORT": free_port()},
    )
    assert "4 ranks" in "".join(said)


def test_the_environment_that_the_operator_of_kubernetes_gives():
    """torchrun takes what a PyTorchJob's manifest does not say from PET_…"""
    said = both_nodes(
        ["torchrun", "-m", "glm_rlhf.engine", "doctor"],
        {
            "PET_NNODES": "2:2",
            "PET_NPROC_PER_NODE": "1",
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
            "PET_RDZV_ID": "job",
            "PET_MAX_RESTARTS": "3",
        },
    )
    assert "2 ranks" in "".join(said)
