"""A step that memory has no room for at once: the same loss and gradient, or the record that is too long."""

import re

import pytest
from little_memory import little_memory
from tiny_models import save_folder
from training_curves import curve, largest_difference, run_main, write_demonstrations, write_pairs

ROOM = 60  # tokens: the longest pair has fewer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm")


def line(stage: str, folder, tmp_path, output: str) -> list[str]:
    data, held_out = tmp_path / f"{stage}.jsonl", tmp_path / "held_out.jsonl"
    write = write_demonstrations if stage == "sft" else write_pairs
    write(data, 10)
    write(held_out, 4, seed=1)
    options = {
        "model.path": folder,
        "data.path": data,
        "data.eval_path": held_out,
        "run.output": tmp_path / output,
        "observe.tensorboard": "false",
        "train.dtype": "fp32",
        "train.steps": 2,
        "train.global_batch_size": 6,
        "train.micro_batch_tokens": 400,
        "train.save_every": 0,
    }
    return [stage, *(f"{key}={value}" for key, value in options.items())]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_step_in_parts_is_the_step_at_once(folder, tmp_path, stage):
    assert run_main(line(stage, folder, tmp_path, "whole"))[0] == 0
    with little_memory(None, ROOM) as met:
        assert run_main(line(stage, folder, tmp_path, "parts"))[0] == 0
    # Training learns it once, and without gradients once a model: the policy serves as DPO's reference.
    assert 2 <= len(met) <= 4
    prefix = "reward" if stage == "reward" else "actor"
    for name in (f"{prefix}/loss", f"{prefix}/grad_norm", "eval/loss"):
        whole, parts = (curve(tmp_path / output, name) for output in ("whole", "parts"))
        assert len(whole) >= 2
        assert largest_difference(parts, whole) <= 1e-6, name


def test_a_record_that_has_no_room_is_named(folder, tmp_path):
    with little_memory(None, 20):
        code, said = run_main(line("sft", folder, tmp_path, "none"))
    assert code == 2
    assert re.search(r"no memory for record \d of \S+held_out.jsonl by itself, 2[1-9] tokens", said), said
