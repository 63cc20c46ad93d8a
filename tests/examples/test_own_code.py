"""The examples that users copy code from run as they stand."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from glm_rlhf.engine.rewards.function import RewardRequest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request(response: str, num_tokens: int, answer: str = "5", is_finished: bool = True) -> RewardRequest:
    return RewardRequest(
        prompt_tokens=(7,),
        response_tokens=(8,) * num_tokens,
        prompt="2+3=",
        response=response,
        is_finished=is_finished,
        extra={"answer": answer},
    )


def test_the_reward_of_ones_own_judges_by_the_record_s_answer():
    reward = load(EXAMPLES / "own_reward.py").right_and_short
    asked = [request("5", 2), request("6", 2), request("5", 2, is_finished=False), request("it is 5", 228)]
    assert reward(asked) == pytest.approx([1.0, 0.0, 0.0, 0.9])


def test_the_loop_of_ones_own_trains_in_a_world_that_stays(tmp_path, capsys):
    load(EXAMPLES / "tiny" / "make_tiny.py").make_tiny(tmp_path / "tiny")
    world = dist.FileStore(str(tmp_path / "world"), 1)
    dist.init_process_group("gloo", store=world, rank=0, world_size=1)
    try:
        load(EXAMPLES / "own_loop.py").main(
            [
                str(EXAMPLES / "tiny" / "ppo.yaml"),
                f"run.output={tmp_path / 'run'}",
                f"model.path={tmp_path / 'tiny' / 'model'}",
                "reward.path=null",
                "reward.function=reward_rules:share_of_low_ids",
                f"data.sft_path={tmp_path / 'tiny' / 'sft.jsonl'}",
                "generation.max_new_tokens=4",
            ]
        )
        assert dist.is_initialized(), "the world of another program stays"
    finally:
        dist.destroy_process_group()
    said = [line for line in capsys.readouterr().err.splitlines() if "reward" in line]
    assert [line.partition(":")[0] for line in said] == ["0", "1", "2", "3"]
    assert sorted(path.name for path in (tmp_path / "run" / "saved").glob("step_*")) == ["step_3", "step_4"]
    old, new = (
        load_file(next(folder.glob("*.safetensors")))
        for folder in (tmp_path / "tiny" / "model", tmp_path / "run" / "policy")
    )
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
