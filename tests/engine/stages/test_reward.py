"""`reward`: the same loss curve in every layout, equal to a plain loop over transformers' trunk."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import save_folder
from training_curves import (
    LAYOUTS,
    curve,
    largest_difference,
    metrics_of,
    run_main,
    write_lines,
    write_pairs,
)
from transformers import AutoModelForSequenceClassification

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.data.sampler import BatchSampler

STEPS = 12
BATCH = 6
LR = 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    return write_pairs(place / "train.jsonl", 24), write_pairs(place / "eval.jsonl", 7, 1)


def command(folder: Path, data: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return [
        "reward",
        f"model.path={folder}",
        f"data.path={data[0]}",
        f"data.eval_path={data[1]}",
        f"run.output={output}",
        "observe.tensorboard=false",
        "reward.l2_coef=0.02",
        "train.dtype=fp32",
        f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_tokens=64",
        "train.eval_every=6",
        f"optimizer.lr={LR}",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(folder, data, tmp_path_factory):
    """The run on one rank."""
    output = tmp_path_factory.mktemp("alone")
    assert main(command(folder, data, output)) == 0
    return output


def trained(output: Path) -> Path:
    return output / "checkpoints" / f"step_{STEPS}"
