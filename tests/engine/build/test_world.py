"""Every command opens its ranks through the comparison of what they were started with."""

import ast
from pathlib import Path

import pytest
import torch.distributed as dist

from glm_rlhf.engine import commands
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.training import SFTConfig

COMMANDS = sorted(Path(commands.__path__[0]).glob("*.py"))


def opened(path, lrs):
    """What this rank says as it opens the world with its learning rate, or its data-parallel size."""
    settings = [f"model.path={path}", f"data.path={path}", "train.steps=4"]
    config = load_config(SFTConfig, None, [*settings, f"optimizer.lr={lrs[dist.get_rank()]}"])
    try:
        with open_world(config) as topology:
            return topology.dp
    except ValueError as error:
        return str(error)


def test_ranks_with_equal_settings_open_it(ranks, tmp_path):
    assert ranks.run(opened, str(tmp_path), [0.5] * 4) == [4] * 4


def test_a_rank_with_another_learning_rate_is_refused_by_all(ranks, tmp_path):
    sentence = (
        "optimizer.lr is 0.25 on rank 1 and 0.5 on rank 0 and 2 more: every rank of a launch has to be "
        "started alike"
    )
    assert ranks.run(opened, str(tmp_path), [0.5, 0.25, 0.5, 0.5]) == [sentence] * 4


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_no_command_opens_a_topology_unchecked(path):
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "open_topology"
    ]
    assert all(any(keyword.arg == "check" for keyword in call.keywords) for call in calls)
