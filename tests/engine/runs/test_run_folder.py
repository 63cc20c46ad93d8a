"""A run folder has one writer, keeps what is its own, and tells which run it is of."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import make_model, save_folder
from training_curves import metrics_of, run_main, write_demonstrations, write_lines, write_pairs

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.training import SFTConfig
from glm_rlhf.engine.runs.checkpoints import RunCheckpoints
from glm_rlhf.parallel.storage.checkpoint_manifest import FILE_NAME, manifest_bytes, read_manifest
from glm_rlhf.parallel.storage.writer_lock import one_writer

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    save_folder(place / "model", "glm", make_model("glm", num_hidden_layers=1))
    write_demonstrations(place / "demonstrations.jsonl", 6)
    write_pairs(place / "pairs.jsonl", 6)
    prompts = [{"prompt_tokens": [3 + i, 9, 5 + i], "answer": f"{i}"} for i in range(4)]
    write_lines(place / "prompts.jsonl", prompts)
    return place


def command(name: str, inputs: Path, output: Path, *more: str) -> list[str]:
    data = {"sft": "demonstrations", "ppo": "prompts"}.get(name, "pairs")
    line = [
        name,
        f"model.path={inputs / 'model'}",
        f"data.path={inputs / data}.jsonl",
        f"run.output={output}",
        "observe.tensorboard=false",
        "train.dtype=fp32",
        f"train.steps={STEPS}",
        "train.global_batch_size=2",
        "train.save_every=3",
        "train.export_every=1",
        "optimizer.lr=2e-3",
    ]
    if name == "ppo":
        line += ["reward.function=reward_rules:share_of_low_ids", "generation.max_new_tokens=4"]
        line += ["generation.page_size=4", "train.sample_every=0"]
    return [*line, *more]


def stop_after(step: int, line: list[str]) -> None:
    """Interrupt a run after all that a step writes."""
    original = RunCheckpoints.after_step

    def after_step(self, number, *args, **kwargs):
        done = original(self, number, *args, **kwargs)
        if number == step:
            raise KeyboardInterrupt
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCheckpoints, "after_step", after_step)
        assert run_main(line)[0] == 130


def exports(output: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (output / "hf").glob("*/model.safetensors")}


@pytest.fixture(scope="module")
def whole(inputs) -> dict[str, bytes]:
    assert run_main(command("sft", inputs, inputs / "whole"))[0] == 0
    found = exports(inputs / "whole")
    assert sorted(found) == [f"step_{step}" for step in range(1, STEPS + 1)]
    return found


@pytest.mark.parametrize("stop", [2, 3], ids=["before the first checkpoint", "after one"])
def test_the_same_command_continues_past_its_own_exports(inputs, whole, tmp_path, stop):
    line = command("sft", inputs, tmp_path)
    stop_after(stop, line)
    assert (tmp_path / "checkpoints" / "step_3").exists() == (stop == 3)
    if stop == 3:
        shutil.copytree(inputs / "whole" / "hf" / "step_4", tmp_path / "hf" / "step_4")  # and died later
    code, said = run_main(line)
    assert code == 0, said
    assert exports(tmp_path) == whole
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, STEPS + 1))


def test_a_damaged_last_checkpoint_whose_export_is_there_is_made_again(inputs, whole, tmp_path):
    line = command("sft", inputs, tmp_path)
    shutil.copytree(inputs / "whole", tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "step_4" / FILE_NAME).write_bytes(b"")
    code, said = run_main(line)
    assert code == 0, said
    assert exports(tmp_path) == whole


def test_a_folder_that_the_run_did_not_export_stays(inputs, tmp_path):
    line = command("sft", inputs, tmp_path / "run")
    stop_after(3, line)
    mine = tmp_path / "run" / "hf" / "step_4"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    code, said = run_main(line)
    assert code == 2
    assert f"{mine} exists and is no export of this run" in said
    assert [path.name for path in mine.iterdir()] == ["notes"]
    other = command("sft", inputs, tmp_path / "other", "run.seed=5")
    stop_after(1, other)
    code, said = run_main([*other, "run.seed=6"])
    assert code == 2
    assert "step_1 exists and is no export of this run" in said
    assert run_main([*other, "run.resume=never"])[0] == 2


def swap(record: dict) -> dict:
    return record | {"chosen_tokens": record["rejected_tokens"], "rejected_tokens": record["chosen_tokens"]}


def other_answer(record: dict) -> dict:
    return record | {"response_tokens": [(token - 2) % 90 + 3 for token in record["response_tokens"]]}


def other_prompt(record: dict) -> dict:
    return record | {"prompt_tokens": record["prompt_tokens"][::-1]}


def other_field(record: dict) -> dict:
    return record | {"answer": "another"}


CHANGES = [
    ("dpo", swap),
    ("reward", swap),
    ("sft", other_answer),
    ("ppo", other_prompt),
    ("ppo", other_field),
]


@pytest.mark.parametrize("name, change", CHANGES)
def test_data_of_equal_lengths_and_other_content_are_refused(inputs, tmp_path, name, change):
    line = command(name, inputs, tmp_path / "run", "train.steps=2", "train.save_every=1")
    stop_after(1, line)
    source = Path(next(one.partition("=")[2] for one in line if one.startswith("data.path=")))
    records = [json.loads(text) for text in source.open()]
    first, *others = records
    changed = write_lines(tmp_path / "data.jsonl", [change(first), *others])
    code, said = run_main([*line, f"data.path={changed}"])
    assert code == 2
    assert "data.path leads to other content than it did" in said
    code, said = run_main([*line, f"data.path={write_lines(tmp_path / 'copy.jsonl', records)}"])
    assert code == 0, said


def change_state(folder: Path, change) -> None:
    """Change a checkpoint's state as a program that knows the format would."""
    manifest = read_manifest(folder)
    state = json.loads(json.dumps(manifest.state))
    change(state)
    (folder / FILE_NAME).write_bytes(manifest_bytes(replace(manifest, state=state)))


def test_a_checkpoint_from_before_contents_were_compared_says_so(inputs, tmp_path, capsys):
    line = command("sft", inputs, tmp_path / "run", "train.save_every=1", "train.export_every=0")
    stop_after(1, line)

    def forget(state):
        del state["identity"]["data.path content"]

    change_state(tmp_path / "run" / "checkpoints" / "step_1", forget)
    other = write_demonstrations(tmp_path / "other.jsonl", 6, seed=3)
    code, said = run_main([*line, f"data.path={other}"])
    assert code == 2
    assert "data.path leads to other content" in said, "the lengths differ"
    assert main(line) == 0
    assert "was written before contents were compared: whether data.path holds" in capsys.readouterr().err


@pytest.mark.parametrize("progress", [None, [], {}, {"step": "1"}, {"step": True}], ids=str)
def test_a_checkpoint_without_a_commands_progress_is_refused(inputs, tmp_path, progress):
    line = command("sft", inputs, tmp_path / "run", "train.save_every=1", "train.export_every=0")
    stop_after(1, line)
    folder = tmp_path / "run" / "checkpoints" / "step_1"
    change_state(folder, lambda state: state.update(progress=progress))
    code, said = run_main(line)
    assert code == 2
    assert f"{folder} is of no command's run" in said


def test_a_refused_command_leaves_the_runs_config(inputs, tmp_path):
    line = command("sft", inputs, tmp_path / "run", "train.export_every=0")
    stop_after(3, line)
    config = tmp_path / "run" / "config.yaml"
    before = config.read_bytes()
    refused = {
        "train.steps=none": "train.steps is 'none'",
        "optimizer.lr=1e-3": "optimizer.lr was 0.002 and is 0.001",
        "run.resume=nowhere": "there is no checkpoint",
        "run.resume=never": "of an earlier run",
        f"model.path={tmp_path}": "config.json",
        f"data.path={tmp_path / 'none.jsonl'}": "none.jsonl",
    }
    for change, sentence in refused.items():
        code, said = run_main([*line, change])
        assert (code, config.read_bytes()) == (2, before), change
        assert sentence in said
    with one_writer(tmp_path / "run", is_inside=True):
        code, said = run_main([*line, "train.save_every=1"])
    assert (code, config.read_bytes()) == (2, before)
    assert f"{tmp_path / 'run'} is being written by process " in said
    assert run_main([*line, "train.save_every=1"])[0] == 0
    assert load_config(SFTConfig, config).train.save_every == 1, "the config of the run as it was accepted"
    after = config.read_bytes()
    assert run_main([*line, "train.keep_last=1"])[0] == 0  # nothing is left to train
    assert config.read_bytes() == after
    answers = ["generate", f"model.path={inputs / 'model'}", f"data.path={inputs / 'prompts.jsonl'}"]
    answers += ["generation.max_new_tokens=2", "train.dtype=fp32", f"run.output={tmp_path / 'run'}"]
    assert run_main(answers)[0] == 0
    assert config.read_bytes() == after, "the folder is the training run's"


def test_a_run_that_ends_with_an_error_leaves_a_report(inputs, tmp_path):
    line = command("ppo", inputs, tmp_path / "run", "train.export_every=0")
    with pytest.MonkeyPatch.context() as patch:
        original = RunCheckpoints.after_step

        def fail(self, step, *args, **kwargs):
            if step == 2:
                raise ValueError("the disk is gone")
            return original(self, step, *args, **kwargs)

        patch.setattr(RunCheckpoints, "after_step", fail)
        assert run_main(line) == (2, "glm-rlhf ppo: the disk is gone")
    report = tmp_path / "run" / "report.html"
    assert "Steps 1 to 2" in report.read_text()
    report.unlink()
    assert run_main(line)[0] == 0
    assert f"Steps 1 to {STEPS}" in report.read_text()
    report.unlink()  # a kill after the last checkpoint
    assert run_main(line)[0] == 0
    assert f"Steps 1 to {STEPS}" in report.read_text()


@pytest.mark.parametrize("name", ["generate", "score", "label", "evaluate"])
def test_output_files_have_one_writer_and_are_replaced_on_demand_only(inputs, tmp_path, name):
    data = "demonstrations" if name == "score" else "prompts"
    output = tmp_path / "run"
    line = [
        name,
        f"model.path={inputs / 'model'}",
        f"data.path={inputs / data}.jsonl",
        f"run.output={output}",
    ]
    line += ["train.dtype=fp32"]
    if name != "score":
        line += ["generation.max_new_tokens=3", "generation.page_size=4"]
    if name == "label":
        save_folder(tmp_path / "judge", "glm", make_model("glm", has_score=True, num_hidden_layers=1))
        line += [f"reward.path={tmp_path / 'judge'}", f"label.prompts_out={tmp_path / 'prompts_out.jsonl'}"]
    if name == "evaluate":
        line += ["reward.function=reward_rules:share_of_low_ids"]
    first = output / f"{name}.jsonl"
    output.mkdir()
    with one_writer(first):
        code, said = run_main(line)
        assert code == 2
        assert f"{first} is being written by process " in said
        assert not list(output.glob(first.name))
    code, said = run_main(line)
    assert code == 0, said
    files = [first]
    files += {
        "label": [output / "label.json", tmp_path / "prompts_out.jsonl"],
        "evaluate": [output / "evaluate.json"],
    }.get(name, [])
    config = (output / "config.yaml").read_bytes()
    if name == "score":  # what follows from its input is replaced
        first.write_text("old\n")
        assert run_main(line)[0] == 0
        assert first.read_text() != "old\n"
        return
    for kept in files:
        for file in files:
            file.unlink(missing_ok=True)
        kept.write_text("mine\n")
        code, said = run_main([*line, "run.seed=3"])
        assert code == 2
        assert f"{kept} exists already" in said
        assert "data.overwrite=true" in said
        assert kept.read_text() == "mine\n"
        assert [file for file in files if file.exists()] == [kept]
    assert (output / "config.yaml").read_bytes() == config
    assert run_main([*line, "data.overwrite=true"])[0] == 0
    assert all(file.read_text() != "mine\n" for file in files)
    names = {path.name for path in output.iterdir()}
    assert names == {"config.yaml", *(file.name for file in files if file.parent == output)}


@pytest.mark.parametrize(
    "line",
    [["demo"], ["bench"], ["plan", "model.path=glm-4-9b", "cluster.gpus=8", "cluster.gpu=h100"]],
    ids=lambda line: line[0],
)
def test_the_other_commands_have_a_run_folder_alone_too(tmp_path, line):
    (tmp_path / "config.yaml").write_text("kept")
    with one_writer(tmp_path, is_inside=True):
        code, said = run_main([*line, f"run.output={tmp_path}"])
    assert code == 2
    assert f"{tmp_path} is being written by process " in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "kept"


def test_ppo_is_refused_before_it_loads_a_model(inputs, tmp_path):
    line = command("ppo", inputs, tmp_path / "run", f"critic.path={tmp_path / 'nowhere'}")
    (tmp_path / "run").mkdir()
    with one_writer(tmp_path / "run", is_inside=True):
        code, said = run_main(line)
    assert code == 2
    assert f"{tmp_path / 'run'} is being written by process " in said
    code, said = run_main(line)
    assert code == 2
    assert f"{tmp_path / 'nowhere'} does not exist" in said, "the refusal left no lock"


IN_THE_WAY = [
    *((Path.touch, name) for name in ("", "tokens", "checkpoints", "hf")),
    *((os.mkfifo, name) for name in ("tokens", "checkpoints/latest", "metrics.jsonl", ".lock")),
    *((os.mkdir, name) for name in ("checkpoints/latest", "data.json")),
]


@pytest.mark.parametrize("make, name", IN_THE_WAY, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_in_the_way_is_one_sentence_and_nobody_waits(inputs, tmp_path, make, name):
    output = tmp_path / "run"
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    make(output / name)
    code, said = run_main(command("sft", inputs, output, "train.steps=1"))
    assert code == 2
    assert said.startswith("glm-rlhf sft: ")
    assert str(output / name) in said
    assert not list(output.glob("hf/step_1"))
