"""No room for what a command writes: one sentence with the file, code 2 on all ranks, nothing half there."""

import contextlib
import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from small_files import small_files
from tiny_models import make_model, save_folder

from glm_rlhf.engine.cli import main

LIMIT_BYTES = 4096
"""Room for config.yaml, and for neither weights nor 140 lines."""

NO_ROOM = {"exported": "/exported/hf/", "saved": "/saved/checkpoints/"}
"""Run → the folder in which it cannot write."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a policy, a reward model, prompts and demonstrations."""
    folder = tmp_path_factory.mktemp("inputs")
    save_folder(folder / "policy", "glm", make_model("glm", seed=5))
    save_folder(folder / "judge", "glm", make_model("glm", has_score=True, seed=6))
    records = [{"prompt_tokens": [3 + n % 90, 5], "response_tokens": [7, 2]} for n in range(140)]
    for name, keys in (("prompts", ("prompt_tokens",)), ("sft", ("prompt_tokens", "response_tokens"))):
        lines = [json.dumps({key: record[key] for key in keys}) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def lines_of(inputs: Path, output: Path) -> dict[str, tuple[list[str], str]]:
    """Return arguments of each command, and the file that it cannot write."""
    policy, judge = f"model.path={inputs / 'policy'}", f"reward.path={inputs / 'judge'}"
    prompts, sft = f"data.path={inputs / 'prompts.jsonl'}", f"data.path={inputs / 'sft.jsonl'}"
    fp32, short = "train.dtype=fp32", "generation.max_new_tokens=2"
    run = {
        name: f"run.output={output / name}" for name in ("evaluate", "generate", "score", "judge", "label")
    }
    several = "generation.num_samples=4"
    return {
        "evaluate": (["evaluate", policy, judge, prompts, fp32, short, run["evaluate"]], "evaluate.jsonl"),
        "generate": (["generate", policy, prompts, fp32, short, run["generate"]], "generate.jsonl"),
        "score": (["score", policy, sft, fp32, run["score"]], "score.jsonl"),
        "judge": (["score", f"model.path={inputs / 'judge'}", sft, fp32, run["judge"]], "score.jsonl"),
        "label": (["label", policy, judge, prompts, fp32, short, several, run["label"]], "label.jsonl"),
    }


def training_line(inputs: Path, output: Path) -> list[str]:
    data = f"data.path={inputs / 'sft.jsonl'}"
    layout = ["parallel.tp=2", "parallel.pp=2", "observe.tensorboard=false"]
    length = ["train.steps=1", "train.global_batch_size=4", "train.dtype=fp32"]
    return ["sft", f"model.path={inputs / 'policy'}", data, *length, *layout, f"run.output={output}"]


def try_all(lines: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Return the exit code of each command and what it said."""
    found = {}
    for name, line in lines.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(line)
        found[name] = code, said.getvalue().splitlines()[-1]
    return found


def try_all_on_a_full_disk(lines: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Return the same where the disk is full for files of lines, an export and a checkpoint; fsync tells."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".jsonl.partial") or any(mark in path for mark in NO_ROOM.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = full
    try:
        return try_all(lines)
    finally:
        os.fsync = fsync


def test_no_command_leaves_half_a_file_under_its_name(inputs, tmp_path):
    lines = lines_of(inputs, tmp_path)
    with small_files(LIMIT_BYTES):
        found = try_all({name: line for name, (line, _) in lines.items()})
    for name, (code, sentence) in found.items():
        path = tmp_path / name / lines[name][1]
        assert code == 2, (name, sentence)
        assert sentence.endswith(f"{path}.partial: File too large"), sentence
        assert not path.exists()


def test_all_ranks_end_together(ranks, inputs, tmp_path):
    lines = lines_of(inputs, tmp_path)
    layout = ["parallel.tp=2"]
    tried = {name: [*line, *layout] for name, (line, _) in lines.items()}
    tried |= {name: training_line(inputs, tmp_path / name) for name in NO_ROOM}
    answers = ranks.run(try_all_on_a_full_disk, tried)
    for name, (_, file) in lines.items():
        path = tmp_path / name / file
        assert [answer[name][0] for answer in answers] == [2] * 4, name
        for answer in answers:
            assert answer[name][1].endswith(f"{path}.partial: No space left on device"), answer[name]
        assert not path.exists()
    for name, mark in NO_ROOM.items():
        assert [answer[name][0] for answer in answers] == [2] * 4, answers
        for answer in answers:
            assert mark in answer[name][1], answer[name]
            assert answer[name][1].split(";")[0].endswith("No space left on device"), answer[name]
        assert not (tmp_path / mark.strip("/") / "step_1").exists()


def test_a_conversion_that_does_not_fit_names_the_file_and_leaves_nothing(inputs, tmp_path, capsys):
    target = tmp_path / "converted"
    line = ["convert", f"model.path={inputs / 'policy'}", f"convert.to={target}", f"run.output={tmp_path}"]
    with small_files(LIMIT_BYTES):
        assert main(line) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"glm-rlhf convert: {tmp_path}/.converted.partial/model.safetensors: File too large"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_config_that_does_not_fit_leaves_the_earlier_one(inputs, tmp_path, capsys):
    line = lines_of(inputs, tmp_path)["score"][0]
    folder = tmp_path / "score"
    folder.mkdir()
    (folder / "config.yaml").write_text("old\n")
    with small_files(100):
        assert main(line) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert str(folder) in sentence
    assert sentence.endswith(": File too large")
    assert (folder / "config.yaml").read_text() == "old\n"
    shutil.rmtree(folder)


def test_tokens_that_do_not_fit_name_the_file_and_leave_nothing(inputs, tmp_path, capsys):
    options = ["train.dtype=fp32", "train.steps=1", "train.global_batch_size=4"]
    data = tmp_path / "long.jsonl"
    record = {"prompt_tokens": [5] * 40, "response_tokens": [7, 2]}
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(60)))
    line = ["sft", f"model.path={inputs / 'policy'}", f"data.path={data}", f"run.output={tmp_path / 'run'}"]
    with small_files(LIMIT_BYTES):
        assert main([*line, *options]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"glm-rlhf sft: {tmp_path / 'run' / 'tokens'}/"), sentence
    assert sentence.endswith(": File too large"), sentence
    assert [path for path in (tmp_path / "run" / "tokens").iterdir() if not path.name.endswith(".lock")] == []
