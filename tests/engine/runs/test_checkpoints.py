"""A run that stops and resumes is, bit for bit, the run that never stopped; other layouts resume too."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_lines import run_on_two_ranks
from tiny_models import make_model, save_folder
from training_curves import curve, metrics_of, run_main, write_demonstrations, write_lines, write_pairs

from glm_rlhf.engine.runs import checkpoints
from glm_rlhf.engine.runs.checkpoints import RunCheckpoints

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    model = make_model("glm", num_hidden_layers=2)
    save_folder(place / "model", "glm", model)
    write_demonstrations(place / "demonstrations.jsonl", 10)
    write_pairs(place / "pairs.jsonl", 10)
    write_lines(place / "prompts.jsonl", [{"prompt_tokens": [3 + i, 9, 5 + i]} for i in range(5)])
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
        "train.global_batch_size=4",
        "train.micro_batch_tokens=64",
        "train.save_every=1",
        "train.keep_last=10",
        "optimizer.lr=2e-3",
        *more,
    ]
    if name == "ppo":
        line += ["reward.function=reward_rules:share_of_low_ids", "generation.max_new_tokens=6"]
        line += ["generation.num_samples=2", "generation.page_size=4", "ppo.epochs=2", "ppo.minibatches=2"]
        line += ["ppo.kl_target=0.05", "ppo.kl_horizon=50", "train.sample_every=0"]
    return line


@contextlib.contextmanager
def stopping_after(last: int):
    """Interrupt a run when its checkpoint of step `last` is under way."""
    original = RunCheckpoints.after_step

    def after_step(self, step, *args, **kwargs):
        original(self, step, *args, **kwargs)
        if step == last:
            raise KeyboardInterrupt

    RunCheckpoints.after_step = after_step
    try:
        yield
    finally:
        RunCheckpoints.after_step = original


def run_and_stop(line: list[str], last: int) -> tuple[int, str]:
    with stopping_after(last):
        return run_main(line)


def outcome(output: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Bytes of the last checkpoint and of the export, and the metrics but for times."""
    folders = (output / "checkpoints" / f"step_{STEPS}", output / "hf" / f"step_{STEPS}")
    files = {path.name: path.read_bytes() for folder in folders for path in folder.glob("*.safetensors")}
    lines = [
        {name: number for name, number in line.items() if not name.startswith(("timing_s", "perf"))}
        for line in metrics_of(output)
    ]
    return files, lines


def later_stops(inputs: Path, name: str, output: Path, whole: Path, stops, options) -> None:
    """Check that runs stopped at each step end as the whole one; they begin as copies of it."""
    expected = outcome(whole)
    assert len(expected[0]) >= 2
    for stop in stops:
        copied = copy_until(stop, whole, output)
        code, said = run_main(command(name, inputs, copied, *options))
        assert code == 0, said
        assert outcome(copied) == expected, stop


def copy_until(stop: int, whole: Path, output: Path) -> Path:
    """Return a copy of a run folder as it was when the run was stopped after a step."""
    copied = output / str(stop)
    shutil.copytree(whole, copied, ignore=shutil.ignore_patterns("hf", "step_*"))
    shutil.copytree(whole / "checkpoints" / f"step_{stop}", copied / "checkpoints" / f"step_{stop}")
    return copied


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_one_rank_resumes_bit_for_bit(inputs, tmp_path, name):
    """Steps 2 and 5 lie within an epoch of 10 records in batches of 4, or of 5 prompts."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_main(command(name, inputs, whole))[0] == 0
    assert run_and_stop(command(name, inputs, stopped), 2)[0] == 130
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["latest", "step_1", "step_2"]
    code, said = run_main(command(name, inputs, stopped))
    assert code == 0, said
    assert outcome(stopped) == outcome(whole)
    later_stops(inputs, name, tmp_path, whole, (1, 2, 3, 4, 5) if name == "sft" else (5,), ())


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name, num_ranks", [("ppo", 1), ("ppo", 2), ("reward", 1)])
def test_a_run_resumes_from_every_step(inputs, tmp_path, name, num_ranks):
    """With the stops between two epochs of PPO, of `test_unfinished_update`, six places."""
    whole, options = tmp_path / "whole", ("parallel.tp=2",) if num_ranks == 2 else ()
    line = command(name, inputs, whole, *options)
    if num_ranks == 1:
        assert run_main(line)[0] == 0
        later_stops(inputs, name, tmp_path, whole, range(1, STEPS), options)
        return
    run_on_two_ranks([line], tmp_path, timeout_s=200)
    copies = [copy_until(stop, whole, tmp_path) for stop in range(1, STEPS)]
    run_on_two_ranks([command(name, inputs, one, *options) for one in copies], tmp_path, timeout_s=200)
    expected = outcome(whole)
    assert len(expected[0]) >= 3
    for copied in copies:
        assert outcome(copied) == expected, copied.name


def run_stops(inputs: Path, name: str, place: Path, options: tuple[str, ...]) -> list[tuple[int, str]]:
    """On every rank: a whole run, one stopped after step 3, and that one resumed."""
    stopped = command(name, inputs, place / "stopped", *options)
    return [
        run_main(command(name, inputs, place / "whole", *options)),
        run_and_stop(stopped, 3),
        run_main(stopped),
    ]


FOUR = [
    ("sft", ("parallel.tp=2", "parallel.pp=2")),
    # In `make test` `health/test_rank_faults.py` resumes PPO on four ranks, `rl/test_checkpoint.py` on one.
    pytest.param("ppo", ("parallel.tp=2",), marks=pytest.mark.slow),
    # One rank resumes with the ordinary optimizer.
    ("sft", ("parallel.tp=2", "parallel.pp=2", "optimizer.in_backward=true")),
    pytest.param("ppo", ("parallel.tp=2", "optimizer.in_backward=true"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, options", FOUR, ids=str)
def test_four_ranks_resume_bit_for_bit_and_one_rank_from_their_checkpoint(
    ranks, inputs, tmp_path, name, options
):
    for whole, stopped, resumed in ranks.run(run_stops, inputs, name, tmp_path, options):
        assert (whole[0], stopped[0], resumed[0]) == (0, 130, 0), (whole, stopped, resumed)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_3"
    alone = command(name, inputs, tmp_path / "alone", f"run.resume={checkpoint}")
    code, said = run_main(alone)
    assert code == 0, said
    found = metrics_of(tmp_path / "alone")
    assert [line["step"] for line in found] == [4, 5, 6]
    metric = "actor/loss" if name == "sft" else "reward/minus_baseline/mean"
    expected = curve(tmp_path / "whole", metric)[3:]
    assert found[0][metric] == pytest.approx(expected[0], rel=1e-6)  # sums in another order


def run_by_the_clock(inputs: Path, output: Path, *options: str) -> int:
    """Run with a clock that moves by 700 s per look on rank 0, and stands on the others."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    times = itertools.count(0, 700 if rank == 0 else 0)
    original, checkpoints.time = checkpoints.time, SimpleNamespace(monotonic=lambda: next(times))
    try:
        return run_main(command("sft", inputs, output, "train.save_every=0", *options))[0]
    finally:
        checkpoints.time = original


def test_a_long_run_saves_by_rank_0s_clock(ranks, inputs, tmp_path):
    assert ranks.run(run_by_the_clock, inputs, tmp_path / "default") == [0] * 4
    found = {output: {} for output in ("default", "off", "often", "few")}
    assert run_by_the_clock(inputs, tmp_path / "off", "train.save_every_s=0") == 0
    assert run_by_the_clock(inputs, tmp_path / "often", "train.save_every_s=600.5") == 0
    assert run_by_the_clock(inputs, tmp_path / "few", "train.save_every_s=600", "train.keep_last=2") == 0
    for output in found:
        found[output] = sorted(path.name for path in (tmp_path / output / "checkpoints").glob("step_*"))
    assert found == {
        "default": ["step_3", "step_6"],  # 1,800 s after the start and after the save
        "off": ["step_6"],
        "often": [f"step_{step}" for step in range(1, 7)],
        "few": ["step_5", "step_6"],
    }


def test_what_a_run_does_with_what_it_finds(inputs, tmp_path):
    """A finished run stays as it is; damage is stepped over; another run is refused."""
    line = command("sft", inputs, tmp_path / "run")
    assert run_main(line)[0] == 0
    before = outcome(tmp_path / "run")
    code, said = run_main(line)
    assert code == 0
    assert "nothing is left to train" in said
    assert outcome(tmp_path / "run") == before
    code, said = run_main([*line, "run.resume=never"])
    assert code == 2
    assert "of an earlier run" in said
    shutil.rmtree(tmp_path / "run" / "hf" / f"step_{STEPS}")  # a kill before the export
    assert run_main(line)[0] == 0
    assert outcome(tmp_path / "run") == before
    manifest = tmp_path / "run" / "checkpoints" / f"step_{STEPS}" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    shutil.rmtree(tmp_path / "run" / "hf" / f"step_{STEPS}")
    code, said = run_main(line)
    assert code == 0, said
    assert outcome(tmp_path / "run") == before
    for option, sentence in (
        ("run.seed=5", "run.seed was 1234 and is 5"),
        ("optimizer.lr=1e-3", "optimizer.lr was 0.002 and is 0.001"),
        (f"data.path={write_demonstrations(tmp_path / 'other.jsonl', 10, 3)}", "data.path leads to other"),
        (f"model.path={save_folder(tmp_path / 'other', 'glm', other_model())}", "model.path leads to other"),
    ):
        code, said = run_main([*line, "train.steps=8", option])
        assert code == 2
        assert sentence in said, said
    code, said = run_main([*line, f"run.resume={tmp_path}"])
    assert code == 2
    assert "there is no checkpoint" in said
    export = tmp_path / "run" / "hf" / f"step_{STEPS}"
    code, said = run_main([*line, f"run.resume={export}"])
    assert code == 2
    assert f"run.resume is {export}, a Hugging Face folder" in said


def test_a_run_folder_with_the_names_of_before_is_refused_until_it_has_those_of_now(inputs, tmp_path):
    line = command("sft", inputs, tmp_path / "run")
    assert run_main(line)[0] == 0
    before = outcome(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "run" / "resume")
    (tmp_path / "run" / "hf").rename(tmp_path / "run" / "checkpoints")
    code, said = run_main(line)
    assert code == 2
    (moves,) = re.findall("`(mv .*)`", said)
    assert moves.count("mv ") == 2
    subprocess.run(moves, shell=True, check=True)
    code, said = run_main(line)
    assert code == 0
    assert "nothing is left to train" in said
    assert outcome(tmp_path / "run") == before


def other_model():
    return make_model("glm", seed=1, num_hidden_layers=2)


def test_a_checkpoint_serves_as_a_model(inputs, tmp_path):
    """`score` on the checkpoint, and on a folder converted from it, gives what the export gives."""
    assert run_main(command("sft", inputs, tmp_path / "run"))[0] == 0
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{STEPS}"
    converted = tmp_path / "converted"
    assert run_main(["convert", f"model.path={checkpoint}", f"convert.to={converted}"])[0] == 0
    export = tmp_path / "run" / "hf" / f"step_{STEPS}"
    assert (converted / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    lines = []
    for number, path in enumerate((checkpoint, export)):
        line = ["score", f"model.path={path}", f"data.path={inputs / 'demonstrations.jsonl'}"]
        assert run_main([*line, f"run.output={tmp_path / str(number)}", "train.dtype=fp32"])[0] == 0
        lines.append([json.loads(text) for text in (tmp_path / str(number) / "score.jsonl").open()])
    assert lines[0] == lines[1]
