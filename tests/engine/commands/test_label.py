"""`label`: the best and the worst of a policy's own answers, as a reward model sees them."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_folder
from training_curves import run_main, token_ids, write_lines, write_pairs

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.commands.label import best_and_worst

SAMPLING = ["generation.num_samples=4", "generation.max_new_tokens=6", "train.dtype=fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm")


@pytest.fixture(scope="module")
def reward_model(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("reward")
    data = write_pairs(place / "pairs.jsonl", 4)
    options = ["train.dtype=fp32", "train.steps=2", "train.global_batch_size=4", "optimizer.lr=1e-2"]
    line = ["reward", f"model.path={folder}", f"data.path={data}", f"run.output={place}", *options]
    assert main([*line, "observe.tensorboard=false"]) == 0
    return place / "hf" / "step_2"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [{"prompt_tokens": token_ids(generator, 1, 9), "answer": str(i)} for i in range(6)]
    return write_lines(path, records)


def command(folder: Path, reward_model: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    paths = [f"model.path={folder}", f"reward.path={reward_model}", f"data.path={prompts}"]
    return ["label", *paths, f"run.output={output}", *SAMPLING, *more]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def test_the_best_and_the_worst_of_what_generate_and_score_say(
    ranks, folder, reward_model, prompts, tmp_path
):
    assert main(command(folder, reward_model, prompts, tmp_path / "one")) == 0
    found = lines_of(tmp_path / "one" / "label.jsonl")

    paths = [f"model.path={folder}", f"data.path={prompts}", f"run.output={tmp_path / 'generate'}"]
    assert main(["generate", *paths, *SAMPLING]) == 0
    answers = lines_of(tmp_path / "generate" / "generate.jsonl")
    sampled = [
        {"prompt_tokens": answer["prompt_tokens"], "response_tokens": answer["tokens"]} for answer in answers
    ]
    data = write_lines(tmp_path / "sampled.jsonl", sampled)
    paths = [f"model.path={reward_model}", f"data.path={data}", f"run.output={tmp_path / 'score'}"]
    assert main(["score", *paths, "train.dtype=fp32"]) == 0
    scores = [line["score"] for line in lines_of(tmp_path / "score" / "score.jsonl")]
    assert [line["index"] for line in found] == list(range(6))
    for line in found:
        own = [
            (score, answer["tokens"])
            for score, answer in zip(scores, answers, strict=True)
            if answer["index"] == line["index"]
        ]
        assert len(own) == 4
        assert (line["chosen_tokens"], line["rejected_tokens"]) == (max(own)[1], min(own)[1])
        # The same sequences in other micro-batches: fp32 rounding.
        assert line["chosen_score"] == pytest.approx(max(own)[0], abs=1e-5)
        assert line["rejected_score"] == pytest.approx(min(own)[0], abs=1e-5)
        assert line["chosen_text"] is None

    layout = ["parallel.tp=2", "train.micro_batch_tokens=16"]
    answers = ranks.run(run_main, command(folder, reward_model, prompts, tmp_path / "four", *layout))
    assert {code for code, _ in answers} == {0}
    for line, other in zip(found, lines_of(tmp_path / "four" / "label.jsonl"), strict=True):
        for name in ("index", "prompt_tokens", "chosen_tokens", "rejected_tokens"):
            assert line[name] == other[name]

    # The pairs are what dpo reads.
    paths = [f"model.path={folder}", f"data.path={tmp_path / 'one' / 'label.jsonl'}"]
    options = ["train.steps=1", "train.global_batch_size=6", "train.dtype=fp32"]
    assert main(["dpo", *paths, f"run.output={tmp_path / 'dpo'}", *options]) == 0


def test_prompts_without_a_pair_are_counted(folder, reward_model, prompts, tmp_path, capsys):
    greedy = ["generation.temperature=0", f"label.prompts_out={tmp_path / 'kept.jsonl'}"]
    assert main(command(folder, reward_model, prompts, tmp_path / "greedy", *greedy)) == 0
    said = capsys.readouterr().err
    assert "labelled 0 pairs of 6 prompts" in said
    assert "excluded 6: all answers are the same" in said
    report = json.loads((tmp_path / "greedy" / "label.json").read_text())
    assert (report["pairs"]["num_same"], report["prompts"]["num_flat"]) == (6, 6)
    assert lines_of(tmp_path / "kept.jsonl") == []

    far = ["label.min_margin=1e6", f"label.prompts_out={tmp_path / 'all.jsonl'}", "label.min_variance=0"]
    assert main(command(folder, reward_model, prompts, tmp_path / "far", *far)) == 0
    assert "excluded 6: best and worst score are equal or too close" in capsys.readouterr().err
    assert lines_of(tmp_path / "far" / "label.jsonl") == []
    assert lines_of(tmp_path / "all.jsonl") == lines_of(prompts)  # as they came, extra fields too


def test_of_equal_scores_the_first_answer_counts():
    score_of = {(1,): 0.5, (2,): 0.5, (3,): -1.0, (4,): -1.0}
    pair = best_and_worst([(2,), (4,), (1,), (3,), (2,)], score_of)
    assert (pair.chosen, pair.rejected) == ((2,), (4,))
    assert best_and_worst([(1,), (1,)], score_of) is None
    assert best_and_worst([(1,), (2,)], score_of).chosen == (1,)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["generation.num_samples=1"], "num_samples is 1: a pair needs at least 2"),
        (["reward.path={policy}"], "has no scalar head: give a reward model"),
        (["reward.path={wide}"], "128 rows in its vocabulary, model.path 96"),
        (["data.out={prompts}"], "the source would be overwritten"),
    ],
)
def test_what_cannot_be_labelled_is_said_in_one_sentence(
    folder, reward_model, prompts, tmp_path, options, sentence
):
    wide = tmp_path / "wide"
    if "wide" in options[0]:
        policy = save_folder(tmp_path / "policy", "glm", make_model("glm", vocab_size=128))
        data = write_pairs(tmp_path / "pairs.jsonl", 1)
        more = ["train.steps=1", "train.global_batch_size=1", "train.dtype=fp32"]
        line = ["reward", f"model.path={policy}", f"data.path={data}", f"run.output={wide}", *more]
        assert main(line) == 0
    options = [
        option.format(policy=folder, wide=wide / "hf" / "step_1", prompts=prompts) for option in options
    ]
    code, said = run_main(command(folder, reward_model, prompts, tmp_path / "run", *options))
    assert code == 2
    assert re.search(sentence, said), said
