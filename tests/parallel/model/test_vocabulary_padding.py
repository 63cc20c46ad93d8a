"""A vocabulary that tp does not divide: padded rows change no number, and no file has them."""

import json
from pathlib import Path

import pytest
import torch
from scored_layouts import score_and_export
from tiny_models import make_model, reference_logprobs, save_folder
from training_curves import token_ids, write_lines
from weight_folders import assert_same_bytes, load_all

from glm_rlhf.engine.cli import main

ROWS = 97
LAYOUTS = ({"tp": 2}, {"tp": 4, "sequence_parallel": True}, {"tp": 2, "pp": 2})


def make_folder(path: Path, **changes) -> Path:
    model = make_model("glm", vocab_size=ROWS, **changes)
    save_folder(path, "glm", model)
    torch.save([found.detach() for found in reference_logprobs(model, sequences())], path / "logprobs.pt")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(0, ROWS, (length,), generator=generator) for length in (7, 12, 3, 9)]
    found[0][3] = ROWS - 1  # the last row, which has padding beside it
    return found


@pytest.mark.parametrize("is_tied", [False, True])
def test_logprobs_are_those_of_transformers_and_exports_have_the_true_rows(ranks, folder, tmp_path, is_tied):
    if is_tied:
        folder = make_folder(tmp_path / "tied", tie_word_embeddings=True)
    expected = torch.load(folder / "logprobs.pt")
    for worst in ranks.run(score_and_export, folder, tmp_path, LAYOUTS, sequences(), expected):
        assert max(worst) < 2e-5, "fp32 rounding"
    for index in range(len(LAYOUTS)):
        assert_same_bytes(load_all(tmp_path / str(index)), load_all(folder))


def ppo(folder: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    return [
        "ppo",
        *(f"model.path={folder}", f"data.path={prompts}", f"run.output={output}"),
        *("reward.function=reward_rules:share_of_low_ids", "train.steps=2", "train.global_batch_size=4"),
        *(
            "train.dtype=fp32",
            "train.save_every=1",
            "generation.max_new_tokens=8",
            "generation.num_samples=2",
        ),
        *("optimizer.lr=1e-3", "observe.tensorboard=false"),
        *("train.sample_every=0", *more),
    ]


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def test_ppo_learns_the_same_generates_in_another_layout_and_resumes_in_a_third(ranks, folder, tmp_path):
    generator = torch.Generator().manual_seed(4)
    records = [{"prompt_tokens": token_ids(generator, 3, 9)} for _ in range(8)]
    prompts = write_lines(tmp_path / "prompts.jsonl", records)
    assert ranks.run(main, ppo(folder, prompts, tmp_path / "dp4")) == [0] * 4
    line = ppo(folder, prompts, tmp_path / "tp2", "parallel.tp=2", "parallel.pp=2", "generation.tp=4")
    assert ranks.run(main, [*line, "generation.pp=1"]) == [0] * 4
    for one, other in zip(metrics(tmp_path / "dp4"), metrics(tmp_path / "tp2"), strict=True):
        for name in ("actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "objective/kl", "actor/entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    first, second = (load_all(tmp_path / name / "hf" / "step_2") for name in ("dp4", "tp2"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-4)
    (tmp_path / "tp2" / "metrics.jsonl").rename(tmp_path / "before.jsonl")
    more = ["train.steps=3", "parallel.tp=4", "parallel.sequence_parallel=true", "generation.tp=4"]
    more.append("generation.pp=1")
    assert ranks.run(main, ppo(folder, prompts, tmp_path / "tp2", *more)) == [0] * 4
    assert [one["step"] for one in metrics(tmp_path / "tp2")] == [3]


def test_top_k_and_top_p_of_padded_rows_are_those_of_one_rank(ranks, folder, tmp_path):
    """They need whole rows of logits, which ranks gather."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt_tokens": [5, ROWS - 1]}] * 4)
    answers = []
    for index, axes in enumerate((["parallel.tp=1"], ["parallel.tp=4"])):
        line = ["generate", f"model.path={folder}", f"data.path={prompts}", "train.dtype=fp32", *axes]
        line += ["generation.max_new_tokens=12", "generation.top_k=20", "generation.top_p=0.8"]
        assert ranks.run(main, [*line, f"run.output={tmp_path / str(index)}"]) == [0] * 4
        answers.append([json.loads(text) for text in (tmp_path / str(index) / "generate.jsonl").open()])
    for one, same in zip(*answers, strict=True):
        assert same["tokens"] == one["tokens"]
        assert same["logprobs"] == pytest.approx(one["logprobs"], abs=2e-5)
        assert same["sampling_logprobs"] == pytest.approx(one["sampling_logprobs"], abs=2e-5)
