"""A model with a weight that is NaN: one sentence with the role and the record, code 2 on all ranks."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, save_folder

from glm_rlhf.engine.cli import main

BAD_ID = 40
"""The id whose row of the embedding is NaN: what does not hold it is finite."""
RECORD = 2
"""The record that holds it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with sound and damaged models, and records of which one holds the id."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, options in (("policy", {"seed": 5}), ("judge", {"has_score": True, "seed": 6})):
        save_folder(folder / name, "glm", make_model("glm", **options))
        save_folder(folder / f"bad_{name}", "glm", make_model("glm", **options))
        path = folder / f"bad_{name}" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.embed_tokens.weight"][BAD_ID] = torch.nan
        save_file(tensors, path, {"format": "pt"})
    prompts = [[5, 6], [7], [9, BAD_ID, 3], [12], [13, 14], [15, 16, 17, 18]]
    answers = [[8, 2], [8, 9, 2]]
    forms = {
        "prompts": [{"prompt_tokens": prompt} for prompt in prompts],
        "sound": [{"prompt_tokens": prompt} for prompt in prompts if BAD_ID not in prompt],
        "sft": [{"prompt_tokens": prompt, "response_tokens": answers[0]} for prompt in prompts],
        "pairs": [
            {"prompt_tokens": prompt, "chosen_tokens": answers[0], "rejected_tokens": answers[1]}
            for prompt in prompts
        ],
    }
    forms |= {
        f"sound_{name}": [record for record in forms[name] if BAD_ID not in record["prompt_tokens"]]
        for name in ("sft", "pairs")
    }
    for name, records in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def line(inputs: Path, output: Path, command: str, *settings: str, **paths: str) -> list[str]:
    """Return the arguments of a command; paths are of models and data by section."""
    named = [f"{section}.path={inputs / name}" for section, name in paths.items()]
    return [command, *named, f"run.output={output}", "train.dtype=fp32", *settings]


def lines_of(inputs: Path, output: Path) -> dict[str, tuple[list[str], str]]:
    """Return commands by what is damaged, and what they are to say."""
    sampled = ["generation.max_new_tokens=3", "generation.num_samples=2", "generation.temperature=0.7"]
    data, bad, judge = "prompts.jsonl", "bad_policy", "judge"
    answers = f"answers {2 * RECORD}, {2 * RECORD + 1}"
    lines = {
        "generate": (
            ("generate", *sampled),
            {"model": bad, "data": data},
            f"the policy's logits in the answers to records {RECORD};",
        ),
        "label": (
            ("label", *sampled),
            {"model": bad, "reward": judge, "data": data},
            f"the policy's logits in the answers to records {RECORD};",
        ),
        "label's judge": (
            ("label", *sampled),
            {"model": "policy", "reward": "bad_judge", "data": data},
            f"the reward model's score of an answer to record {RECORD} is nan",
        ),
        "evaluate": (
            ("evaluate", *sampled),
            {"model": bad, "reward": judge, "data": data},
            f"the policy's logits in the answers to prompts {RECORD};",
        ),
        "evaluate against": (
            ("evaluate", *sampled),
            {"model": "policy", "against": bad, "reward": judge, "data": data},
            f"the model of against.path's logits in the answers to prompts {RECORD};",
        ),
        "evaluate's judge": (
            ("evaluate", *sampled),
            {"model": "policy", "reward": "bad_judge", "data": data},
            f"the reward model's scores of {answers}",
        ),
        "score": (
            ("score",),
            {"model": bad, "data": "sft.jsonl"},
            f"record {RECORD} has a logprob that is not finite",
        ),
        "score's judge": (
            ("score", "data.form=pairs"),
            {"model": "bad_judge", "data": "pairs.jsonl"},
            f"the reward model's score of an answer to record {RECORD} is nan",
        ),
        "dpo's reference": (
            ("dpo", "train.steps=1", "train.global_batch_size=6", "observe.tensorboard=false"),
            {"model": "policy", "reference": bad, "data": "pairs.jsonl"},
            "the reference gives",
        ),
    }
    return {
        name: (line(inputs, output / name.replace(" ", "_"), *arguments, **paths), sentence)
        for name, (arguments, paths, sentence) in lines.items()
    }


def try_all(lines: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Return the exit code of each command and the last line that it said."""
    found = {}
    for name, arguments in lines.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(arguments)
        found[name] = code, said.getvalue().splitlines()[-1]
    return found


LAYOUTS = {"tp2 pp2": ("parallel.tp=2", "parallel.pp=2"), "dp2 cp2": ("parallel.cp=2",)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_command_names_the_model_and_the_record_on_all_ranks(ranks, inputs, tmp_path, layout):
    lines = lines_of(inputs, tmp_path)
    answers = ranks.run(try_all, {name: [*arguments, *layout] for name, (arguments, _) in lines.items()})
    for name, (_, sentence) in lines.items():
        assert [answer[name][0] for answer in answers] == [2] * 4, (name, answers)
        for answer in answers:
            assert sentence in answer[name][1], (name, answer[name][1])
    assert not list(tmp_path.rglob("*.jsonl")), "nothing is written"


PPO = (
    *("train.steps=2", "train.global_batch_size=4", "train.sample_every=1", "observe.tensorboard=false"),
    *("generation.max_new_tokens=2", "evaluate.every=1"),
)


def metrics_of(output: Path, name: str) -> list[float | None]:
    return [json.loads(text).get(name) for text in (output / "metrics.jsonl").open()]


def test_ppo_skips_evaluations_that_are_not_finite_and_says_so(inputs, tmp_path, capsys):
    paths = {"model": "policy", "reward": "bad_judge", "data": "sound.jsonl", "evaluate": "prompts.jsonl"}
    assert main(line(inputs, tmp_path, "ppo", *PPO, **paths)) == 0
    said = capsys.readouterr().err
    for step in range(3):
        assert (
            f"the evaluation after iteration {step} was skipped ({step + 1} so far): not finite: on rank 0"
            in said
        )
    assert f"the reward model's scores of answers {RECORD}" in said
    assert metrics_of(tmp_path, "eval/is_skipped") == [1.0] * 3
    assert metrics_of(tmp_path, "actor/is_step_skipped") == [None, 0.0, 0.0]
    assert (tmp_path / "hf" / "step_2").is_dir()


def test_ppo_with_a_reward_model_that_is_never_finite_ends_with_one_sentence(ranks, inputs, tmp_path):
    paths = {"model": "policy", "reward": "bad_judge", "data": "bad.jsonl", "evaluate": "bad.jsonl"}
    records = [{"prompt_tokens": [BAD_ID, 3 + n]} for n in range(4)]
    (inputs / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = line(inputs, tmp_path, "ppo", *PPO, "train.max_nonfinite_steps=2", "parallel.tp=2", **paths)
    for answer in ranks.run(try_all, {"ppo": arguments}):
        code, sentence = answer["ppo"]
        assert code == 2
        assert "stopped after 2 skipped iterations in a row" in sentence
        assert "the reward model's scores of answers" in sentence
    assert metrics_of(tmp_path, "eval/is_skipped") == [1.0, 1.0]


def test_a_reward_that_overflows_is_no_baseline(inputs, tmp_path, capsys):
    """Of a prompt that is answered again, the baseline is asked for again, instead of NaN for ever."""
    paths = {"model": "policy", "reward": "bad_judge", "data": "bad.jsonl"}
    (inputs / "bad.jsonl").write_text(json.dumps({"prompt_tokens": [BAD_ID]}) + "\n")
    settings = ["train.steps=1", "train.global_batch_size=1", "generation.max_new_tokens=2"]
    quiet = ["observe.tensorboard=false", "train.sample_every=1"]
    assert main(line(inputs, tmp_path, "ppo", *settings, *quiet, **paths)) == 0
    said = capsys.readouterr().err
    assert "iteration 1 was skipped (1 of 3 in a row): not finite: on rank 0 the reward model's" in said
    assert "no sample answers of the trained policy were written: not finite" in said


@pytest.mark.parametrize(
    ("command", "data", "model"),
    [("sft", "sft", "bad_policy"), ("reward", "pairs", "bad_judge"), ("dpo", "pairs", "bad_policy")],
)
def test_training_skips_an_evaluation_that_is_not_finite(inputs, tmp_path, capsys, command, data, model):
    settings = [
        "train.steps=2",
        "train.global_batch_size=4",
        "observe.tensorboard=false",
        "optimizer.lr=1e-5",
    ]
    paths = {"model": model, "data": f"sound_{data}.jsonl"}
    if command == "dpo":  # its reference is asked before the training, and does not answer
        paths["reference"] = "policy"
    arguments = line(inputs, tmp_path, command, *settings, f"data.eval_path={inputs / data}.jsonl", **paths)
    assert main(arguments) == 0
    said = capsys.readouterr().err
    role = "reward" if command == "reward" else "policy"
    for step in (0, 2):
        assert (
            f"the evaluation after step {step} was skipped: not finite: on rank 0 the {role}'s loss on"
            in said
        )
    assert f"{data}.jsonl:{RECORD + 1}" in said or f"record {RECORD}" in said, said
    assert metrics_of(tmp_path, "eval/is_skipped") == [1.0, None, 1.0]
