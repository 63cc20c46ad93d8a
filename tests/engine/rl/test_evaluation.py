"""The best policy stays the best over kills and resumes, and no policy is evaluated twice."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from faulty_run import Fault, run_with_fault
from safetensors.torch import load_file
from tiny_models import make_model, save_folder
from training_curves import metrics_of, run_main, write_lines

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.rl import evaluation
from glm_rlhf.engine.runs.checkpoints import RunCheckpoints
from glm_rlhf.engine.runs.exports import MARK

FAULT = Fault(kind="SIGTERM", phase="critic", rank=0)
"""In the second mini-batch of the first epoch."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    save_folder(place / "model", "glm", make_model("glm", num_hidden_layers=1))
    write_lines(place / "prompts.jsonl", [{"prompt_tokens": [3 + i, 9]} for i in range(4)])
    write_lines(place / "held_out.jsonl", [{"prompt_tokens": [5 + i, 8]} for i in range(3)])
    return place


def command(inputs: Path, output: Path, *more: str) -> list[str]:
    options = {
        "model.path": inputs / "model",
        "data.path": inputs / "prompts.jsonl",
        "run.output": output,
        "reward.function": "reward_rules:share_of_low_ids",
        "evaluate.every": 2,
        "evaluate.path": inputs / "held_out.jsonl",
        "generation.max_new_tokens": 4,
        "generation.page_size": 4,
        "observe.tensorboard": "false",
        "optimizer.lr": 1e-3,
        "train.dtype": "fp32",
        "train.global_batch_size": 2,
        "train.sample_every": 0,
        "train.save_every": 1,
        "train.steps": 6,
    }
    return ["ppo", *(f"{key}={value}" for key, value in options.items()), *more]


def run(line: list[str], rewards: Sequence[float], *, stop: int | None = None, is_saved: bool = True) -> None:
    """Run a command whose evaluations give these rewards; interrupt it after or before a step's save."""
    original, left = RunCheckpoints.after_step, list(rewards)

    def after_step(self, step, *args, **options):
        if step == stop and not is_saved:
            raise KeyboardInterrupt
        done = original(self, step, *args, **options)
        if step == stop:
            raise KeyboardInterrupt
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "as_metrics", lambda _: {"eval/reward": left.pop(0)})
        patch.setattr(RunCheckpoints, "after_step", after_step)
        code, said = run_main(line)
    assert code == (0 if stop is None else 130), said
    assert left == [], "an evaluation was skipped"


def best(output: Path) -> tuple[int, float] | None:
    """Step and reward of the best policy, as both files tell; its weights must be that step's export."""
    if not (output / "hf" / "best").exists():
        return None
    mark = json.loads((output / "hf" / "best" / MARK).read_text())
    written = json.loads((output / "hf" / "best.json").read_text())
    assert written == {"step": mark["step"], "eval/reward": mark["eval/reward"]}
    weights = [
        load_file(output / "hf" / name / "model.safetensors") for name in ("best", f"step_{mark['step']}")
    ]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    return mark["step"], mark["eval/reward"]


def test_a_worse_policy_after_a_resume_does_not_take_its_place(inputs, tmp_path):
    line = command(inputs, tmp_path, "train.export_every=1")
    run(line, [0.1, 0.9], stop=3)
    assert best(tmp_path) == (2, 0.9)
    run(line, [0.5, 0.8])
    assert best(tmp_path) == (2, 0.9)
    run([*line, "train.steps=8"], [0.95])
    assert best(tmp_path) == (8, 0.95)


def test_a_best_policy_that_is_newer_than_the_checkpoint_counts(inputs, tmp_path):
    line = command(inputs, tmp_path, "train.export_every=1")
    run(line, [0.1, 0.9], stop=2, is_saved=False)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_1"]
    (tmp_path / "hf" / "best.json").write_text('{"step": 1}')  # the kill came before this file
    run(line, [0.4, 0.5], stop=4)
    assert best(tmp_path) == (2, 0.9)


def test_a_start_that_was_better_than_all_later_policies_is_remembered(inputs, tmp_path):
    line = command(inputs, tmp_path)
    run(line, [0.9, 0.3], stop=3)
    run(line, [0.4, 0.5])
    assert best(tmp_path) is None


def test_a_best_policy_that_was_removed_makes_room_for_the_next(inputs, tmp_path):
    line = command(inputs, tmp_path, "train.export_every=1")
    run(line, [0.1, 0.9], stop=3)
    shutil.rmtree(tmp_path / "hf" / "best")
    run(line, [0.5, 0.3])
    assert best(tmp_path) == (4, 0.5)


def test_rewards_on_other_prompts_are_not_compared(inputs, tmp_path, capsys):
    line = command(inputs, tmp_path, "train.export_every=1")
    run(line, [0.1, 0.9], stop=3)
    other = write_lines(tmp_path / "other.jsonl", [{"prompt_tokens": [50 + i]} for i in range(3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "as_metrics", lambda _: {"eval/reward": 0.5})
        assert main([*line, f"evaluate.path={other}"]) == 0
    assert "earlier rewards are not comparable" in capsys.readouterr().err
    assert best(tmp_path) == (4, 0.5)


def test_a_best_folder_of_somebody_else_is_refused_before_the_first_iteration(inputs, tmp_path):
    (tmp_path / "hf" / "best").mkdir(parents=True)
    (tmp_path / "hf" / "best" / "notes").write_text("mine")
    code, said = run_main(command(inputs, tmp_path))
    assert code == 2
    assert f"{tmp_path / 'hf' / 'best'} exists and is no export of this run" in said
    assert not (tmp_path / "metrics.jsonl").exists() or metrics_of(tmp_path) == []
    assert run_main(command(inputs, tmp_path, "evaluate.keeps_best=false"))[0] == 0
    assert (tmp_path / "hf" / "best" / "notes").read_text() == "mine"


def test_half_trained_weights_are_not_evaluated_as_the_first_ones(inputs, tmp_path):
    """The run is left inside iteration 1, between two epochs; every evaluation is made once."""
    options = ["ppo.epochs=2", "ppo.minibatches=2", "train.steps=2"]
    whole, parts = (command(inputs, tmp_path / name, *options) for name in ("whole", "parts"))
    assert main(whole) == 0
    original, steps = evaluation.PPOEvaluation.run, []

    def watched(self, step):
        steps.append(step)
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.PPOEvaluation, "run", watched)
        assert run_with_fault(FAULT, parts, 0) == 0
        assert steps == [0]
        assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").glob("step_*")) == ["step_1"]
        assert main(parts) == 0
    assert steps == [0, 2]
    found, expected = (
        [
            {name: value for name, value in one.items() if not name.startswith(("timing_s", "perf"))}
            for one in metrics_of(tmp_path / name)
        ]
        for name in ("parts", "whole")
    )
    assert found == expected
    assert [one["step"] for one in found] == [0, 1, 2]
