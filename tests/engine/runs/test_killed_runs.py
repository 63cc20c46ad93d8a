"""Whole commands, killed while they export and keep the best policy, or started twice into one place."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import killed_runs
import pytest
from tiny_models import make_model, save_folder
from training_curves import metrics_of, write_demonstrations, write_lines

NUM_KILLS = 20
STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    save_folder(place / "model", "glm", make_model("glm", num_hidden_layers=1))
    save_folder(place / "judge", "glm", make_model("glm", has_score=True, num_hidden_layers=1))
    write_demonstrations(place / "demonstrations.jsonl", 6)
    write_lines(place / "prompts.jsonl", [{"prompt_tokens": [3 + i, 9]} for i in range(4)])
    return place


def ask(folder: Path, requests: list[list]) -> list:
    """Return the answers of a process that runs commands in children, see `killed_runs`."""
    path = folder / "requests.json"
    path.write_text(json.dumps([[*one, str(folder / f"{n}.log")] for n, one in enumerate(requests)]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, killed_runs.__file__, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def ppo(inputs: Path, output: Path) -> list[str]:
    options = {
        "model.path": inputs / "model",
        "data.path": inputs / "prompts.jsonl",
        "run.output": output,
        "reward.function": "reward_rules:share_of_low_ids",
        "evaluate.every": 1,
        "evaluate.path": inputs / "prompts.jsonl",
        "generation.max_new_tokens": 4,
        "generation.page_size": 4,
        "optimizer.lr": 5e-3,
        "ppo.kl_coef": 0,
        "train.dtype": "fp32",
        "train.export_every": 1,
        "train.global_batch_size": 2,
        "train.sample_every": 0,
        "train.save_every": 2,
        "train.steps": STEPS,
    }
    return ["ppo", *(f"{key}={value}" for key, value in options.items())]


def outcome(output: Path) -> tuple[dict[str, bytes], str, list[int]]:
    """Weights of all exports, the best policy, and the steps of the metrics."""
    files = {path.parent.name: path.read_bytes() for path in (output / "hf").glob("*/model.safetensors")}
    steps = [line["step"] for line in metrics_of(output)]
    left = [path.name for path in (output / "hf").iterdir() if path.name not in files]
    assert left == ["best.json"]
    return files, (output / "hf" / "best.json").read_text(), steps


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_same_command_ends_as_if_it_had_never_been_killed(inputs, tmp_path):
    """Kills before and after changes of names, of `best` above all; and two damaged last checkpoints."""
    kinds = ("kill", "kill in two steps")
    wholes = {kind: tmp_path / f"whole {len(kind)}" for kind in kinds}
    changes = dict(
        zip(kinds, ask(tmp_path, [[kind, ppo(inputs, wholes[kind]), -1] for kind in kinds]), strict=True)
    )
    expected = outcome(wholes["kill"])
    assert expected == outcome(wholes["kill in two steps"])
    assert sorted(expected[0]) == ["best", *(f"step_{step}" for step in range(1, STEPS + 1))]
    best_step = json.loads(expected[1])["step"]
    assert expected[0]["best"] == expected[0][f"step_{best_step}"]
    draw, moments = random.Random(7), []
    for kind in kinds:
        names = changes[kind]
        assert sum(name.endswith(" best") for name in names) >= 1
        of_best = [
            2 * n + after for n, name in enumerate(names) if name.endswith(" best") for after in (0, 1)
        ]
        others = [moment for moment in range(2 * len(names)) if moment not in of_best]
        chosen = draw.sample(of_best, min(5, len(of_best)))
        chosen += draw.sample(others, NUM_KILLS // 2 - 1 - len(chosen))
        moments += [(kind, moment) for moment in chosen]
    outputs = [tmp_path / f"run {n}" for n in range(len(moments))]
    killed = [
        [kind, ppo(inputs, output), moment] for (kind, moment), output in zip(moments, outputs, strict=True)
    ]
    assert ask(tmp_path, killed) == [True] * len(moments)
    for damaged in ("manifest.json", "rank_00000.safetensors"):
        output = tmp_path / f"damaged {damaged}"
        shutil.copytree(wholes["kill"], output)
        (output / "checkpoints" / f"step_{STEPS}" / damaged).write_bytes(b"{")
        outputs.append(output)
    assert len(outputs) == NUM_KILLS
    assert ask(tmp_path, [["run", ppo(inputs, output), None] for output in outputs]) == [0] * NUM_KILLS
    for output in outputs:
        assert outcome(output) == expected, output.name


def twice(inputs: Path, folder: Path) -> dict[str, tuple[list[str], Path, Path]]:
    """Command lines with what they lock and what they leave."""
    model, prompts = f"model.path={inputs / 'model'}", f"data.path={inputs / 'prompts.jsonl'}"
    precision, length = "train.dtype=fp32", "generation.max_new_tokens=3"
    demonstrations = f"data.path={inputs / 'demonstrations.jsonl'}"
    training = ["train.steps=1", "train.global_batch_size=2", "observe.tensorboard=false"]
    judge, rule = f"reward.path={inputs / 'judge'}", "reward.function=reward_rules:share_of_low_ids"
    outputs = {name: folder / name for name in ("sft", "ppo", "generate", "score", "label", "evaluate")}
    lines = {
        "sft": ["sft", model, demonstrations, precision, *training],
        "ppo": ["ppo", model, prompts, precision, length, rule, *training],
        "generate": ["generate", model, prompts, precision, length],
        "score": ["score", model, demonstrations, precision],
        "label": ["label", model, prompts, precision, length, judge],
        "evaluate": ["evaluate", model, prompts, precision, length, rule],
    }
    cases = {}
    for name, line in lines.items():
        output = outputs[name]
        locked = output if name in ("sft", "ppo") else output / f"{name}.jsonl"
        left = output / "hf" / "step_1" / "model.safetensors" if locked == output else locked
        cases[name] = ([*line, f"run.output={output}"], locked, left)
    target = folder / "converted"
    line = ["convert", model, f"convert.to={target}", f"run.output={folder / 'convert'}"]
    return cases | {"convert": (line, target, target / "model.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_of_two_commands_into_one_place_the_second_is_refused_and_names_the_first(inputs, tmp_path):
    cases = {place: twice(inputs, tmp_path / place) for place in ("alone", "pairs")}
    for place in cases:
        (tmp_path / place).mkdir()
    alone = [["run", line, None] for line, _, _ in cases["alone"].values()]
    pairs = [["pair", line, str(locked)] for line, locked, _ in cases["pairs"].values()]
    answers = ask(tmp_path, [*alone, *pairs])
    assert answers[: len(alone)] == [0] * len(alone)
    for name, (first, second, said, pid) in zip(cases["pairs"], answers[len(alone) :], strict=True):
        _, locked, left = cases["pairs"][name]
        assert (first, second) == (0, 2), (name, said)
        last = said.splitlines()[-1]
        assert last.startswith(f"glm-rlhf {name}: {locked} is being written by process {pid} on "), last
        assert re.search(rf" on {re.escape(socket.gethostname())} since \d{{4}}-", last)
        content = left.read_bytes()
        assert content == cases["alone"][name][2].read_bytes(), name
        assert any(content)
