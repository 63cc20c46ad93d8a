"""Layers follow their caller's mode of gradients, and gather no input where the caller does."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from tiny_training import Case, make_batches, make_chunks
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat.parallel_layers import column_parallel_without_input_communication
from glm_rlhf.parallel.model.packing import share
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

LAYER = Upstream(
    patch="parallel_layers.keep_grad_mode",
    symbol="megatron.core.transformer.transformer_layer:TransformerLayer",
)
COLUMN = Upstream(
    patch="parallel_layers.column_parallel_without_input_communication",
    symbol="megatron.core.tensor_parallel.layers:ColumnParallelLinear",
)


def has_graph(topology, *, with_gradients: bool, replaced: bool) -> bool:
    """Whether the first layer's output has a graph; its sum normed first, so that weights are in it."""
    case = Case(changes={"family": "glm4", "has_sandwich_norms": True})
    (chunk,) = make_chunks(case, topology)
    layer = chunk.decoder.layers[0]
    if not replaced:
        layer.bias_dropout_add_exec_handler = torch.enable_grad
    outputs = []
    layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    with torch.set_grad_enabled(with_gradients):
        chunk(share(make_batches(case, topology)[0]))
    return outputs[0].requires_grad


def test_a_layer_keeps_a_graph_where_its_caller_wants_one(topology):
    assert not has_graph(topology, with_gradients=False, replaced=True), moved(
        LAYER, "turns gradients on by another name"
    )
    assert has_graph(topology, with_gradients=True, replaced=True)


def test_megatron_core_would_keep_one_always(topology):
    assert has_graph(topology, with_gradients=False, replaced=False), moved(
        LAYER, "no longer turns gradients on"
    )


def communication_of_layers() -> list[tuple[bool, bool, bool]]:
    """Of Megatron-core's layer and of the replacement, what they do with a sequence-parallel input."""
    with open_topology(Layout(tp=4, sequence_parallel=True)) as topology:
        (chunk,) = make_chunks(Case(), topology)
        config = chunk.config
        options = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "gather_output": False,
            "tp_group": topology.tp_group,
        }
        layers = (
            ColumnParallelLinear(config.hidden_size, 16, **options),
            column_parallel_without_input_communication(config.hidden_size, 16, **options),
            chunk.decoder.layers[0].self_attention.linear_kv,
        )
        return [
            (layer.sequence_parallel, layer.disable_grad_reduce, layer.allreduce_dgrad) for layer in layers
        ]


def test_the_layer_has_no_communication_of_its_own(ranks):
    for upstream, replacement, of_the_model in ranks.run(communication_of_layers):
        assert upstream == (True, False, False), moved(COLUMN, f"says {upstream} of its communication")
        assert replacement == of_the_model == (False, True, False), moved(
            COLUMN, f"says {replacement} of replacement"
        )
