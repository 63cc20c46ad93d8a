"""Computed sizes equal those of the built model in every layout, on every stage."""

from dataclasses import replace

import pytest
import torch
from tiny_training import CONFIG

from benchmarks.harness.one_rank_world import world_of_one_rank
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.presets import preset
from glm_rlhf.parallel.spec.shard_sizes import chunk_sizes, num_parameters

GLM4 = replace(CONFIG, family="glm4", has_sandwich_norms=True, has_qkv_bias=False)


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (CONFIG, {}),
        (GLM4, {"tp": 2, "pp": 2}),
        (CONFIG, {"tp": 4, "sequence_parallel": True}),  # more ranks than key/value heads
        (replace(CONFIG, has_tied_head=True), {"pp": 4}),
        (CONFIG, {"pp": 2, "vpp": 2}),
    ],
    ids=["one rank", "tp2 pp2", "tp4", "pp4 tied", "pp2 vpp2"],
)
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_sizes_are_those_of_the_model_that_is_built(config, axes, role):
    for rank in (0, 3):
        with world_of_one_rank(rank, 4), open_topology(Layout(**axes)) as topology:
            chunks = build_model(config, topology, role=role, dtype=torch.bfloat16)
            for index, chunk in enumerate(chunks):
                found = chunk_sizes(
                    config,
                    topology.layout,
                    has_scalar_head=role == "critic",
                    stage=topology.pp_rank,
                    chunk=index,
                )
                for dtype, sizes in ((torch.bfloat16, found.model_dtype), (torch.float32, found.fp32)):
                    built = sorted(p.numel() for p in chunk.parameters() if p.dtype is dtype)
                    assert sorted(sizes) == built, (rank, index, dtype)


def test_whole_models_have_the_published_sizes():
    assert num_parameters(preset("chatglm3-6b")) == 6_243_584_000
    assert num_parameters(preset("chatglm3-6b"), has_scalar_head=True) == 6_243_584_000 - 65024 * 4096 + 4097


def test_a_layout_that_does_not_split_the_model_is_refused():
    with pytest.raises(ValueError, match=r"num_layers 4 .* pp 3"):
        chunk_sizes(CONFIG, Layout(pp=3), has_scalar_head=False, stage=0, chunk=0)
