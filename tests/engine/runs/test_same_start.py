"""One rank of a launch with another setting, model, file or program is refused by all, before it trains."""

import contextlib
import os
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.training import SFTConfig
from glm_rlhf.engine.runs import same_start
from glm_rlhf.engine.runs.same_start import check_same_start
from glm_rlhf.kernels.dispatch.launch import ENVIRONMENT_VARIABLE
from glm_rlhf.parallel.runtime.agreement import Content

SETTINGS = (
    *("run.seed=7", "run.name=other", "run.watchdog_s=99", "optimizer.lr=0.5", "optimizer.betas=[0.5, 0.6]"),
    *("train.global_batch_size=32", "train.steps=900", "train.dtype=fp32", "train.save_every=3"),
    *("parallel.tp=2", "generation.temperature=0.5", "generation.stop=[end]", "reward.function=other:rule"),
    *("ppo.clip=0.3", "ppo.kl_coef=0.5", "observe.trace=true"),
)
PATHS = ("model.path", "data.path", "critic.path", "reference.path", "data.sft_path")


def write_inputs(folder: Path, word: str) -> list[str]:
    """Return settings that lead to a model folder and to files, each of which holds `word`."""
    settings = ["reward.function=rewards:rule", "train.steps=10", "ppo.sft_coef=0.1"]
    for key in PATHS:
        path = folder / key.replace(".", "_")
        if key.startswith("data"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{{"prompt": "{word}"}}\n')
        else:
            path.mkdir(parents=True)
            (path / "config.json").write_text("{}")
            (path / "model.safetensors").write_bytes(b"weights " * 100_000 + word.encode())
        settings.append(f"{key}={path}")
    return settings


def refusal(settings, root=PPOConfig) -> str | None:
    config = load_config(root, None, settings)
    try:
        check_same_start(config)
    except ValueError as error:
        return str(error)
    return None


def refusals_of_settings(settings, changes):
    """What this rank says of each change of one rank, another rank each time."""
    return [
        refusal([*settings, change] if dist.get_rank() == number % dist.get_world_size() else settings)
        for number, change in enumerate(changes)
    ]


def refusals_of_programs(settings):
    """What this rank says where rank 3 has another version, code, choice of kernels or command."""
    version = metadata.version
    other_code = Content(place="/elsewhere", digest=lambda: "other")
    others = (
        mock.patch.object(metadata, "version", lambda name: "0.0" if name == "tokenizers" else version(name)),
        mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "torch"}),
        mock.patch.object(same_start, "_code", return_value={"the code of glm-rlhf": other_code}),
    )
    said = []
    for other in others:
        with other if dist.get_rank() == 3 else contextlib.nullcontext():
            said.append(refusal(settings))
    is_other = dist.get_rank() == 3
    said.append(
        refusal(["model.path=m", "data.path=d", "train.steps=10"], SFTConfig)
        if is_other
        else refusal(settings)
    )
    return said


def test_ranks_that_were_started_alike_continue(ranks, tmp_path):
    assert ranks.run(refusal, write_inputs(tmp_path, "same")) == [None] * 4


def test_another_folder_with_the_same_content_is_the_same_start(ranks, tmp_path):
    here, there = write_inputs(tmp_path / "a", "same"), write_inputs(tmp_path / "b", "same")
    assert ranks.run(refusals_of_settings, here, there) == [[None] * len(there)] * 4


def test_another_setting_on_one_rank_is_named_with_the_rank(ranks, tmp_path):
    answers = ranks.run(refusals_of_settings, write_inputs(tmp_path, "same"), SETTINGS)
    for number, change in enumerate(SETTINGS):
        said = {answer[number] for answer in answers}
        assert len(said) == 1, change
        assert said.pop().startswith(f"{change.partition('=')[0]} is "), change
        assert f" on rank {number % 4} and " in answers[0][number]


@pytest.mark.parametrize("same_length", [True, False])
def test_other_content_behind_a_path_is_named_with_the_rank(ranks, tmp_path, same_length):
    here = write_inputs(tmp_path / "a", "one")
    there = [
        setting
        for setting in write_inputs(tmp_path / "b", "two" if same_length else "three")
        if "path=" in setting
    ]
    answers = ranks.run(refusals_of_settings, here, there)
    for number, key in enumerate(PATHS):
        said = {answer[number] for answer in answers}
        assert len(said) == 1, key
        assert said.pop().startswith(f"{key} holds something else on rank {number % 4} ({tmp_path}/b/"), key


def test_a_file_that_one_rank_does_not_see_is_named(ranks, tmp_path):
    settings = write_inputs(tmp_path, "same")
    (answers,) = {
        tuple(answer) for answer in ranks.run(refusals_of_settings, settings, ["data.path=/nowhere"])
    }
    assert answers[0].startswith("data.path holds something else on rank 0 (/nowhere) than on rank 1")


def test_other_programs_on_one_rank_are_named(ranks, tmp_path):
    (said,) = {tuple(answer) for answer in ranks.run(refusals_of_programs, write_inputs(tmp_path, "same"))}
    subjects = (
        "the version of tokenizers",
        ENVIRONMENT_VARIABLE,
        "the code of glm-rlhf",
        "the command's config",
    )
    for subject, sentence in zip(subjects, said, strict=True):
        assert sentence is not None, subject
        assert sentence.startswith(f"{subject} "), sentence
        assert " on rank 3 " in sentence
