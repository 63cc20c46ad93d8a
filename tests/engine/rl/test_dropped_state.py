"""Each item of a PPO run's state, dropped from a checkpoint or replaced in it, is refused or changes bits."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, save_folder
from training_curves import metrics_of, run_main, write_lines

from glm_rlhf.parallel.storage.checkpoint_manifest import (
    FILE_NAME,
    FileInfo,
    manifest_bytes,
    rank_file_name,
    read_manifest,
)

STOP = 5
LAST = 6
Change = Callable[[dict, dict], None]


def command(inputs: Path, output: Path, *more: str) -> list[str]:
    options = {
        "model.path": inputs / "model",
        "data.path": inputs / "prompts.jsonl",
        "run.output": output,
        "reward.function": "reward_rules:share_of_low_ids",
        "generation.max_new_tokens": 6,
        "observe.tensorboard": "false",
        "optimizer.lr": 2e-3,
        "ppo.kl_target": 0.05,
        "ppo.reference_baseline": "true",
        "train.dtype": "fp32",
        "train.global_batch_size": 4,
        "train.keep_last": 10,
        "train.sample_every": 0,
        "train.save_every": 1,
        "train.steps": LAST,
    }
    return ["ppo", *(f"{key}={value}" for key, value in options.items()), *more]


def outcome(output: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Bits of each tensor that the last iteration left, in whatever order, and metrics but for times."""
    files = [
        *(output / "checkpoints" / f"step_{LAST}").glob("*.safetensors"),
        output / "hf" / f"step_{LAST}" / "model.safetensors",
    ]
    bits = {
        f"{file.name}: {name}": value.numpy().tobytes()
        for file in files
        for name, value in load_file(file).items()
    }
    return bits, [
        {name: number for name, number in line.items() if not name.startswith(("timing_s", "perf"))}
        for line in metrics_of(output)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("dropped")
    save_folder(place / "model", "glm", make_model("glm", num_hidden_layers=2))
    write_lines(place / "prompts.jsonl", [{"prompt_tokens": [3 + i, 9, 5 + i]} for i in range(5)])
    return place


@pytest.fixture(scope="module")
def whole(inputs) -> Path:
    """A run of six iterations, with its inputs beside it."""
    code, said = run_main(command(inputs, inputs / "whole"))
    assert code == 0, said
    return inputs / "whole"


def dropped(prefix: str) -> Change:
    def change(tensors: dict, state: dict) -> None:
        names = [name for name in tensors if name.startswith(prefix)]
        assert names, prefix
        for name in names:
            del tensors[name]

    return change


def replaced(prefix: str, new: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like) -> Change:
    def change(tensors: dict, state: dict) -> None:
        found = {name: new(value) for name, value in tensors.items() if name.startswith(prefix)}
        assert any(not torch.equal(value, tensors[name]) for name, value in found.items()), prefix
        tensors.update(found)

    return change


def set_to(section: str, key: str, value: object) -> Change:
    def change(tensors: dict, state: dict) -> None:
        assert state[section][key] != value
        state[section][key] = value

    return change


def other_generator(value: torch.Tensor) -> torch.Tensor:
    assert value.dtype == torch.uint8
    return torch.Generator().manual_seed(99).get_state()


def change_checkpoint(change: Change, whole: Path, output: Path, *, rank: int) -> None:
    """Copy a run as it stood at step 5, what one rank stored changed, with sound checksums all the same."""
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("hf", "step_*"))
    folder = output / "checkpoints" / f"step_{STOP}"
    shutil.copytree(whole / "checkpoints" / folder.name, folder)
    file = folder / rank_file_name(rank)
    tensors, manifest = load_file(file), read_manifest(folder)
    change(tensors, manifest.state)
    save_file(tensors, file)
    content = file.read_bytes()
    facts = FileInfo(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    parts = list(manifest.ranks)
    parts[rank] = replace(parts[rank], facts=facts)
    (folder / FILE_NAME).write_bytes(manifest_bytes(replace(manifest, ranks=tuple(parts))))


def resume_after(change: Change, whole: Path, output: Path) -> tuple[int, str]:
    change_checkpoint(change, whole, output, rank=0)
    return run_main(command(whole.parent, output))


def test_a_checkpoint_rewritten_unchanged_resumes_to_the_same_bits(whole, tmp_path):
    """Without this the tests below would show nothing."""
    code, said = resume_after(lambda tensors, state: None, whole, tmp_path / "run")
    assert code == 0, said
    assert outcome(tmp_path / "run") == outcome(whole)


REPLACED = {
    "policy": replaced("policy/weight/"),
    "critic": replaced("critic/weight/"),
    "policy's running means": replaced("policy/exp_avg/"),
    "policy's running squares": replaced("policy/exp_avg_sq/", torch.ones_like),
    "critic's running means": replaced("critic/exp_avg/"),
    "critic's running squares": replaced("critic/exp_avg_sq/", torch.ones_like),
    "torch's generator": replaced("rank//torch", other_generator),
    "scores of reference answers": replaced("rank//baseline_scores"),
    "answers drawn so far": set_to("progress", "num_answered", 0),
    "place in the data": set_to("progress", "step", STOP - 1),
    "KL coefficient": set_to("progress", "kl_coef", 0.3),
}


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(item, marks=[pytest.mark.slow] if number % 3 else [])
        for number, item in enumerate(REPLACED)
    ],
)
def test_another_value_changes_bits(whole, tmp_path, item):
    code, said = resume_after(REPLACED[item], whole, tmp_path / "run")
    assert code == 0, said
    assert outcome(tmp_path / "run") != outcome(whole)


REFUSED = {
    "policy": dropped("policy/weight/decoder.layers.1.mlp.linear_fc1"),
    "critic": dropped("critic/weight/value_head.weight"),
    "policy's optimizer": dropped("policy/exp_avg_sq/decoder.final_layernorm"),
    "critic's optimizer": dropped("critic/exp_avg/value_head.weight"),
    "torch's generator": dropped("rank//torch"),
    "another reference": set_to("identity", "reference.path", "0" * 64),
}


@pytest.mark.parametrize("item", REFUSED)
def test_what_lacks_or_is_of_another_run_is_refused(whole, tmp_path, item):
    code, said = resume_after(REFUSED[item], whole, tmp_path / "run")
    assert code == 2, said
    assert not (tmp_path / "run" / "checkpoints" / "step_6").exists()


LAYOUT = "parallel.tp=2"
REPLACED_ON_RANKS = {
    "policy": (3, replaced("policy/weight/")),
    "critic": (2, replaced("critic/weight/")),
    "policy's running means": (1, replaced("policy/exp_avg/")),
    "policy's running squares": (3, replaced("policy/exp_avg_sq/", torch.ones_like)),
    "critic's running means": (3, replaced("critic/exp_avg/")),
    "critic's running squares": (2, replaced("critic/exp_avg_sq/", torch.ones_like)),
    "torch's generator": (3, replaced("rank//torch", other_generator)),
    "scores of reference answers": (2, replaced("rank//baseline_scores")),
}
REFUSED_ON_RANKS = {
    "policy's weights": (3, dropped("policy/weight/")),
    "policy's optimizer": (2, dropped("policy/exp_avg_sq/")),
    "critic's optimizer": (1, dropped("critic/exp_avg/")),
    "torch's generator": (3, dropped("rank//torch")),
    "Python's generator": (1, dropped("rank//python")),
    "numpy's generator": (2, dropped("rank//numpy")),
}


def run_mains(lines: list[list[str]]) -> list[tuple[int, str]]:
    return [run_main(line) for line in lines]


@pytest.mark.slow
def test_what_one_of_four_ranks_stored_is_missed_as_well(ranks, inputs, tmp_path):
    """Two tensor-parallel ranks, twice: each holds a share of its own of everything."""
    whole, unchanged = inputs / "whole of four", (0, lambda tensors, state: None)
    for ((code, said),) in ranks.run(run_mains, [command(inputs, whole, LAYOUT)]):
        assert code == 0, said
    changes = {"nothing": unchanged, **REPLACED_ON_RANKS}
    changes |= {f"no {item}": change for item, change in REFUSED_ON_RANKS.items()}
    for item, (rank, change) in changes.items():
        change_checkpoint(change, whole, tmp_path / item, rank=rank)
    answers = ranks.run(run_mains, [command(inputs, tmp_path / item, LAYOUT) for item in changes])
    codes = {item: {answer[n][0] for answer in answers} for n, item in enumerate(changes)}
    assert codes == {item: {2} if item.startswith("no ") else {0} for item in changes}, answers
    expected = outcome(whole)
    assert outcome(tmp_path / "nothing") == expected
    for item in REPLACED_ON_RANKS:
        assert outcome(tmp_path / item) != expected, item
