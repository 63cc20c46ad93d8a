"""`PPOEngine.save` and `load`: the next iteration's bits are those of the engine that continued."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_folder

from glm_rlhf.engine import PPOConfig, PPOEngine

PROMPTS = [[5, 6, 7], [8, 9], [14], [20, 21, 22]]


def config_of(model: Path, *more: str) -> PPOConfig:
    options = {
        "model.path": model,
        "data.path": "unused.jsonl",
        "reward.function": "reward_rules:share_of_low_ids",
        "train.steps": 9,
        "train.dtype": "fp32",
        "generation.max_new_tokens": 4,
        "optimizer.lr": 1e-3,
        "ppo.reference_baseline": "true",
        "ppo.kl_target": 0.01,
    }
    return PPOConfig.from_yaml(None, [*(f"{key}={value}" for key, value in options.items()), *more])


def iterate(engine: PPOEngine) -> dict[str, float]:
    found = engine.update(engine.make_experience(engine.generate(PROMPTS)))
    return {name: value for name, value in found.items() if not name.startswith(("timing_s/", "perf/"))}


def state_of(engine: PPOEngine) -> list[torch.Tensor]:
    return [
        tensor.detach().clone()
        for chunks in (engine.roles.models["policy"], engine.roles.models["critic"])
        for chunk in chunks
        for _, tensor in chunk.named_weights()
    ]


def save_and_continue(model: Path, folder: Path, *layout: str):
    """On each rank: what a third iteration gives where it follows two, and where it follows a load."""
    with PPOEngine(config_of(model, *layout)) as engine:
        for number in range(2):
            iterate(engine)
            path = engine.save(folder, progress={"epoch": number, "place": [1, 2]}, keep_last=1)
        saved, expected, weights = state_of(engine), iterate(engine), state_of(engine)
    with PPOEngine(config_of(model, *layout)) as engine:
        progress = engine.load(folder)
        restored, found = state_of(engine), iterate(engine)
        same = [torch.equal(a, b) for a, b in zip(state_of(engine), weights, strict=True)]
        back = engine.load(path)
        again = [torch.equal(a, b) for a, b in zip(state_of(engine), saved, strict=True)]
    is_restored = [torch.equal(a, b) for a, b in zip(restored, saved, strict=True)]
    return progress, back, all(is_restored), found == expected, all(same), all(again)


def load_elsewhere(model: Path, folder: Path, *layout: str):
    """On each rank: metrics of an iteration in another layout, and what loading of other settings says."""
    with PPOEngine(config_of(model, *layout)) as engine:
        engine.load(folder)
        iteration, kl_coef, found = (
            engine.roles.iteration,
            engine.roles.progress()["kl_coef"],
            iterate(engine),
        )
    refused = []
    with PPOEngine(config_of(model, *layout, "ppo.clip=0.1")) as engine:
        for path in (folder, folder / "step_2" / "none", folder.parent / "nowhere"):
            with pytest.raises(ValueError) as error:
                engine.load(path)
            refused.append(str(error.value))
    return iteration, kl_coef, found, refused


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


def test_a_loaded_engine_continues_bit_for_bit_and_in_another_layout(ranks, model, tmp_path):
    answers = ranks.run(save_and_continue, model, tmp_path / "saved", "parallel.tp=2")
    for progress, back, *is_same in answers:
        assert progress == back == {"epoch": 1, "place": [1, 2]}
        assert is_same == [True] * 4
    assert [path.name for path in (tmp_path / "saved").glob("step_*")] == ["step_2"]
    first = None
    for iteration, kl_coef, found, refused in ranks.run(load_elsewhere, model, tmp_path / "saved"):
        assert iteration == 2
        assert kl_coef != config_of(model).ppo.kl_coef, "steered towards its target"
        first = first or found
        assert found == first
        settings, missing, nowhere = refused
        assert "ppo.clip was 0.2 and is 0.1" in settings
        assert "holds none" in missing
        assert "holds none" in nowhere
