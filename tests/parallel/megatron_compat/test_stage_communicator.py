"""A stage that knows what it will receive asks nobody."""

import torch
from tiny_training import Case
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat.stage_communicator import KnownShapesCommunicator
from glm_rlhf.parallel.model.glm import transformer_config

SHAPES = Upstream(
    patch="stage_communicator.KnownShapesCommunicator",
    symbol="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes",
)


def test_shapes_come_in_order_and_nothing_is_communicated(topology):
    config = transformer_config(Case().config, topology, dtype=torch.float32, recompute_layers=False)
    link = KnownShapesCommunicator(
        topology.pp_group, config, from_previous=[[5, 1, 8], [3, 1, 8]], from_next=iter([[7, 1, 8]])
    )
    ask = getattr(link, SHAPES.path[-1])
    assert ask(None, None, True, True) == ([5, 1, 8], [7, 1, 8])
    assert ask(torch.ones(2), None, False, False) == ([0, 0, 0], [0, 0, 0])
    assert ask(None, None, True, False) == ([3, 1, 8], [0, 0, 0])


def test_megatron_core_receives_by_the_shapes_that_it_is_given(topology, monkeypatch):
    config = transformer_config(Case().config, topology, dtype=torch.float32, recompute_layers=False)
    assert config.variable_seq_lengths
    link = KnownShapesCommunicator(topology.pp_group, config, from_previous=[[5, 1, 8]], from_next=[])
    received = []

    def exchange(**tensors):
        received.append(tensors["tensor_recv_prev"])
        return {}

    monkeypatch.setattr("megatron.core.pipeline_parallel.p2p_communication._p2p_ops", exchange)
    link.recv_forward([0, 1, 8], is_first_stage=False)
    assert [tuple(tensor.shape) for tensor in received] == [(5, 1, 8)], moved(SHAPES, "is not asked")
