"""The command `evaluate`: the same figures in every layout, and what they mean."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_folder

from glm_rlhf.engine.cli import main

LAYOUTS = (("parallel.tp=2", "parallel.pp=2"), ("parallel.cp=2", "train.micro_batch_tokens=40"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with two policies and prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    generator = torch.Generator().manual_seed(4)
    lines = [
        json.dumps({"prompt_tokens": torch.randint(3, 96, (n,), generator=generator).tolist()})
        for n in (3, 8, 2, 5, 12, 4)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    save_folder(folder / "policy", "glm", make_model("glm", seed=5))
    save_folder(folder / "other", "glm", make_model("glm", seed=6))
    return folder


def command(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        "evaluate",
        f"model.path={inputs / 'policy'}",
        f"against.path={inputs / 'other'}",
        f"data.path={inputs / 'prompts.jsonl'}",
        f"run.output={output}",
        "reward.function=reward_rules:share_of_low_ids",
        "evaluate.pass_k=[1, 2]",
        "evaluate.pass_reward=0.6",
        "generation.max_new_tokens=6",
        "generation.num_samples=2",
        "train.dtype=fp32",
        *more,
    ]


def figures(output: Path) -> dict[str, dict]:
    return json.loads((output / "evaluate.json").read_text())["figures"]


def test_every_layout_gives_the_same_figures(ranks, inputs, tmp_path, capsys):
    assert main(command(inputs, tmp_path / "one")) == 0
    table = capsys.readouterr().out
    one = figures(tmp_path / "one")
    assert list(one) == [line.split()[0] for line in table.splitlines()[1:]]
    assert one["reward"]["mean"] != one["reward_against"]["mean"]
    assert one["pass@1"]["mean"] <= one["pass@2"]["mean"]
    assert one["reward"]["num_units"] == 6
    answers = [json.loads(line) for line in (tmp_path / "one" / "evaluate.jsonl").open()]
    assert len(answers) == 12
    assert sum(answer["reward"] for answer in answers) / 12 == pytest.approx(one["reward"]["mean"])
    for number, layout in enumerate(LAYOUTS):
        output = tmp_path / str(number)
        assert ranks.run(main, command(inputs, output, *layout)) == [0] * 4
        assert figures(output) == one  # the same tokens are drawn, and the rule counts them


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("evaluate.pass_k=[3]", "it must be at least the largest k"),
        ("reward.function=reward_rules:too_few", "11 rewards for 12 answers"),
        ("against.path=/nowhere", "/nowhere"),
        ("reward.function=null", "no reward is given"),
        ("reward.path=http://judge:8000", "reward.path is http://judge:8000, an address"),
        ("generation.stop_ids=[2,96]", "stop_ids holds 96, the model's vocabulary ends at 95"),
    ],
)
def test_what_cannot_work_ends_with_one_sentence(inputs, tmp_path, capsys, change, sentence):
    assert main(command(inputs, tmp_path, change)) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
