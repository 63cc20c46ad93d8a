"""The command demo, shortened: every stage runs, what it reports hangs together, the export answers alike."""

import json
import re

import pytest

from glm_rlhf.engine.commands.demo import run
from glm_rlhf.engine.config.sections import RunSection
from glm_rlhf.engine.config.tools import DemoConfig, DemoSection


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    config = DemoConfig(
        run=RunSection(name="demo", output=str(folder), seed=0),
        demo=DemoSection(
            num_held_out=150,
            num_pair_prompts=400,
            sft_steps=80,
            reward_steps=2,
            ppo_steps=2,
            checks_layouts=False,
        ),
    )
    return config, folder, run.run(config)


def test_every_stage_leaves_its_model_and_the_figures_hang_together(shortened):
    _, folder, code = shortened
    assert code == 0
    for stage, steps in (("sft", 80), ("reward", 2), ("ppo", 2)):
        assert (folder / stage / "hf" / f"step_{steps}" / "config.json").exists()
        assert (folder / stage / "config.yaml").exists()
    facts = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    results = facts["results"]
    lines = read(folder / "answers" / "sft_sampled.jsonl")
    prompts = read(folder / "data" / "sft_sampled_prompts.jsonl")
    num_right = sum(
        line["text"].strip() == sum_of(prompts[line["index"]]["prompt"]) and line["finish_reason"] == "stop"
        for line in lines
    )
    assert len(lines) == 4 * 150
    assert results["sampled_accuracy"]["sft"]["mean"] == pytest.approx(num_right / len(lines))
    for estimate in (results["greedy_win_rate"], results["kl"], results["length"]["ppo"]):
        assert estimate["low"] <= estimate["mean"] <= estimate["high"]
        assert estimate["num_units"] == 150
    assert facts["timing_s"]["all"] == pytest.approx(
        sum(seconds for name, seconds in facts["timing_s"].items() if name != "all")
    )
    page = (folder / "ppo" / "report.html").read_text(encoding="utf-8")
    assert "PPO against SFT on held-out prompts" in page


def test_pairs_are_a_right_and_a_wrong_answer_to_prompts_that_are_not_held_out(shortened):
    _, folder, _ = shortened
    held_out = {tuple(line["prompt_tokens"]) for line in read(folder / "answers" / "sft_sampled.jsonl")}
    text_of = {
        (tuple(line["prompt_tokens"]), tuple(line["tokens"])): line["text"].strip()
        for line in read(folder / "answers" / "sft_pairs.jsonl")
    }
    asked = read(folder / "data" / "sft_pairs_prompts.jsonl")
    prompt_of = {
        tuple(line["prompt_tokens"]): asked[line["index"]]["prompt"]
        for line in read(folder / "answers" / "sft_pairs.jsonl")
    }
    pairs = read(folder / "data" / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        prompt = tuple(pair["prompt_tokens"])
        assert prompt not in held_out
        answer = sum_of(prompt_of[prompt])
        assert text_of[prompt, tuple(pair["chosen_tokens"])] == answer
        assert text_of[prompt, tuple(pair["rejected_tokens"])] != answer


def test_transformers_gives_the_same_greedy_tokens(shortened):
    pytest.importorskip("transformers")
    _, folder, _ = shortened
    (check,) = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["checks"]
    assert (check["name"], check["num_asked"], check["num_same"]) == ("transformers", 32, 32)


def test_torchrun_and_a_folder_of_another_command_are_refused(tmp_path, monkeypatch):
    config = DemoConfig(run=RunSection(name="demo", output=str(tmp_path)))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "precious").write_text("weights")
    with pytest.raises(ValueError, match="holds sft which no demo made"):
        run.run(config)
    assert (tmp_path / "sft" / "precious").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        run.run(config)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sum_of(prompt: str) -> str:
    return str(sum(map(int, re.findall(r"\d+", prompt))))
