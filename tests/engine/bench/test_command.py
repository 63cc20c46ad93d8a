"""`bench` measures what is asked for, on the ranks that it starts or that are there."""

import json
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

from glm_rlhf.engine.bench import command, sizes
from glm_rlhf.engine.bench.harness import Contender
from glm_rlhf.engine.bench.parts import models
from glm_rlhf.engine.cli import main
from glm_rlhf.engine.config.bench import BenchSection
from glm_rlhf.engine.cost.hardware import GPUS, assumed_rates, read_rates
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.presets import preset

CPU = torch.device("cpu")
MEASURED = {4: assumed_rates(GPUS["h100"], network_bytes_per_s=50e9)}
"""What stands for the rates of a world of so many ranks."""


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that take no time."""
    found = replace(
        sizes.sizes_for(BenchSection(), CPU),
        model=replace(preset("tiny-glm"), num_layers=2),
        lengths=(5, 9, 17, 4),
        batch=2,
        num_prompts=4,
        prompt_tokens=6,
        new_tokens=4,
        tokens=64,
        length=16,
    )
    monkeypatch.setattr(command, "sizes_for", lambda _section, _device: found)
    return found


def test_parts_of_one_process_are_right_and_timed(tmp_path, tiny, capsys):
    parts = "bench.parts=[model,generation,ppo,checkpoint]"
    assert main(["bench", f"run.output={tmp_path}", parts, "bench.budget_s=0.001"]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["generation", "forward", "training", "ppo", "save", "restore"]
    for row in rows:
        for entry in row["entries"]:
            assert entry["timing"] is not None, entry
            assert entry["error"] is None or entry["error"] < 1e-4
    names = [entry["name"] for row in rows[:3] for entry in row["entries"]]
    assert names[1::2] == ["transformers, padded"] * 3
    assert "ours, packed" in capsys.readouterr().out
    page = (tmp_path / "bench.md").read_text()
    assert "- liger-kernel: missing; pip install liger-kernel" in page
    assert not (tmp_path / "rates.json").exists()


def test_a_wrong_peer_is_not_timed(tiny, monkeypatch):
    """Answers of other tokens than the likeliest, and logprobs of another weight."""
    with open_topology(Layout()) as topology:
        policy = models.Policy(tiny, topology, with_transformers=True)
        with torch.no_grad():
            policy.transformers.model.lm_head.weight.mul_(-1.0)
        rows = [models.generation_row(policy, budget_s=0.0, command="x")]
        rows += models.model_rows(policy, budget_s=0.0, command="x")
    for row in rows:
        engine, peer = row.entries
        assert engine.timing is not None
        assert peer.timing is None
        assert peer.status.startswith("wrong: error ")


def test_only_peers_that_are_asked_for_run():
    keeps = command._keeps(BenchSection(against=("liger-kernel",)))
    names = [
        "ours",
        "torch eager",
        "torch.compile",
        "liger-kernel (no entropy)",
        "quack-kernels",
        "flashinfer",
    ]
    kept = [name for name in names if keeps(Contender(name=name, run=lambda: None))]
    assert kept == ["ours", "torch eager", "liger-kernel (no entropy)"]


def on_ranks(folder, parts, found):
    """Run the command on this world's ranks, as under torchrun."""
    rank = torch.distributed.get_rank()
    with (
        mock.patch.dict(os.environ, WORLD_SIZE="4", RANK=str(rank), LOCAL_RANK=str(rank)),
        mock.patch.object(command, "sizes_for", return_value=found),
        mock.patch.object(command, "rates_on", lambda topology, _model, _size: MEASURED[topology.world_size]),
    ):
        return main(["bench", f"run.output={folder}", f"bench.parts={parts}"])


def test_a_world_measures_its_steps_and_the_rates_that_plan_takes(ranks, tmp_path, tiny):
    fewer_tokens = replace(tiny, tokens=128)
    assert ranks.run(on_ranks, tmp_path, "[scaling,rates]", fewer_tokens) == [0] * 4
    point = json.loads((tmp_path / "scaling.json").read_text())
    assert (point["num_ranks"], point["backend"], point["tokens"]) == (4, "gloo", 128)
    assert all(seconds > 0 for seconds in (*point["weak_s"], *point["strong_s"]))
    assert read_rates(tmp_path / "rates.json") == MEASURED[4]
    assert ranks.run(on_ranks, tmp_path, "[kernels,rates]", fewer_tokens) == [2] * 4


def test_a_world_that_fails_leaves_the_other_figures(tmp_path, tiny, monkeypatch):
    def failing(folder, num_ranks, settings, *, threads):
        raise RuntimeError(f"bench on {num_ranks} ranks failed: no port")

    monkeypatch.setattr(command, "launch", failing)
    options = ["bench.parts=[ppo,scaling]", "bench.ranks=[2]", "bench.budget_s=0.001"]
    assert main(["bench", f"run.output={tmp_path}", *options]) == 1
    page = (tmp_path / "bench.md").read_text()
    assert "bench on 2 ranks failed: no port" in page
    assert "an iteration of PPO" in page


def test_the_default_ranks_are_powers_of_two(monkeypatch):
    for cores, expected in ((1, [1, 2]), (2, [1, 2]), (3, [1, 2]), (64, [1, 2, 4])):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert sizes.ranks_for(BenchSection()) == expected
    assert sizes.ranks_for(BenchSection(ranks=(3, 5))) == (3, 5)


def test_a_preset_gives_the_shape_with_fewer_layers():
    found = sizes.sizes_for(BenchSection(model="chatglm3-6b", layers=2), CPU)
    assert (found.model.num_layers, found.model.hidden_size, found.model.family) == (2, 4096, "glm")
    with pytest.raises(ValueError, match="neither a folder nor a preset's name"):
        sizes.sizes_for(BenchSection(model="chatglm4"), CPU)
