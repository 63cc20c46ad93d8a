"""Every patch finds upstream what it replaces or reads; where that has moved, one sentence says so.

A table of what each function of `parallel/megatron_compat` relies on. How upstream behaves is tested
in the file of each patch.
"""

import ast
from pathlib import Path

import pytest
from upstream import TESTED, Upstream, check

ROOM = Path(__file__).resolve().parents[3] / "parallel" / "megatron_compat"
CORE = "megatron.core"
RANDOM = f"{CORE}.tensor_parallel.random"
OPTIMIZER = f"{CORE}.optimizer.distrib_optimizer:DistributedOptimizer"
WRAPPER = f"{CORE}.distributed.distributed_data_parallel:DistributedDataParallel"
BUFFER = f"{CORE}.distributed.param_and_grad_buffer:_ParamAndGradBuffer"
COLUMN = f"{CORE}.tensor_parallel.layers:ColumnParallelLinear"

RELIED_ON = [
    Upstream(
        patch="cpu_patches.install",
        symbol=f"{RANDOM}:_get_cuda_rng_state",
        parameters=("device", "clone", "graph_safe"),
    ),
    Upstream(
        patch="cpu_patches.install",
        symbol=f"{RANDOM}:_set_cuda_rng_state",
        parameters=("new_state", "device", "graph_safe"),
    ),
    Upstream(patch="cpu_patches.cuda_type_names", symbol="torch:Tensor.type"),
    Upstream(
        patch="cpu_patches.cuda_type_names",
        symbol=f"{OPTIMIZER}._build_model_and_main_param_groups",
        mentions=("type", "torch.cuda.BFloat16Tensor", "torch.cuda.FloatTensor"),
    ),
    Upstream(
        patch="cpu_patches.cuda_type_names",
        symbol=f"{CORE}.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        mentions=("type", "torch.cuda.FloatTensor"),
    ),
    Upstream(patch="lazy_compile.install", symbol="torch:compile"),
    Upstream(patch="lazy_compile.install", symbol=f"{CORE}.jit:jit_fuser"),
    Upstream(
        patch="rng_state.random_state",
        symbol=f"{RANDOM}:CudaRNGStatesTracker.get_states",
        parameters=("self",),
    ),
    Upstream(
        patch="rng_state.set_random_state",
        symbol=f"{RANDOM}:CudaRNGStatesTracker.set_states",
        parameters=("self", "states"),
    ),
    Upstream(
        patch="process_groups.created_groups", symbol=f"{CORE}.parallel_state:_global_process_group_list"
    ),
    Upstream(
        patch="process_groups.created_groups",
        symbol=f"{CORE}.parallel_state:create_group",
        mentions=("_global_process_group_list",),
    ),
    Upstream(
        patch="stores.world_store",
        symbol="torch.distributed.distributed_c10d:_get_default_store",
        parameters=(),
    ),
    Upstream(
        patch="stores.num_collectives",
        symbol="torch.distributed:ProcessGroup._get_sequence_number_for_group",
    ),
    Upstream(patch="timed_waits.around_waits", symbol="torch.distributed:Work.wait"),
    Upstream(
        patch="distributed_optimizer.sub_optimizers",
        symbol=f"{CORE}.optimizer.optimizer:ChainedOptimizer",
        sets=("chained_optimizers", "is_stub_optimizer"),
    ),
    Upstream(
        patch="distributed_optimizer.sub_optimizers",
        symbol=OPTIMIZER,
        sets=("is_stub_optimizer",),
    ),
    Upstream(
        patch="distributed_optimizer.owns_part_of",
        symbol=OPTIMIZER,
        sets=("model_param_gbuf_map",),
    ),
    Upstream(
        patch="distributed_optimizer.first_element",
        symbol=f"{OPTIMIZER}._get_model_param_range_map",
        parameters=("self", "param"),
    ),
    Upstream(
        patch="distributed_optimizer.main_weights",
        symbol=OPTIMIZER,
        sets=(
            "model_float16_groups",
            "model_fp32_groups",
            "shard_fp32_from_float16_groups",
            "shard_fp32_groups",
        ),
    ),
    Upstream(
        patch="distributed_optimizer.copy_main_weights_to_model",
        symbol=f"{OPTIMIZER}._copy_main_params_to_model_params",
        parameters=("self",),
    ),
    Upstream(patch="distributed_optimizer.state_tensors", symbol=OPTIMIZER, sets=("optimizer",)),
    Upstream(
        patch="data_parallel.gradient_buffers", symbol=WRAPPER, sets=("buffers", "expert_parallel_buffers")
    ),
    Upstream(patch="data_parallel.gradient_buffers", symbol=BUFFER, sets=("grad_data",)),
    Upstream(patch="data_parallel.weight_buffers", symbol=BUFFER, sets=("param_data",)),
    Upstream(
        patch="data_parallel.cut_reference_cycles",
        symbol=WRAPPER,
        sets=("grad_accs", "remove_forward_pre_hook_handles"),
    ),
    Upstream(
        patch="data_parallel.cut_reference_cycles",
        symbol=f"{WRAPPER}.disable_forward_pre_hook",
        parameters=("self", "param_sync"),
    ),
    Upstream(
        patch="parallel_layers.keep_grad_mode",
        symbol=f"{CORE}.transformer.transformer_layer:TransformerLayer",
        sets=("bias_dropout_add_exec_handler",),
    ),
    Upstream(
        patch="parallel_layers.column_parallel_without_input_communication",
        symbol=f"{COLUMN}.__init__",
        takes=("disable_grad_reduce",),
    ),
    Upstream(
        patch="parallel_layers.column_parallel_without_input_communication",
        symbol=COLUMN,
        sets=("sequence_parallel",),
    ),
    Upstream(patch="torch_operators.copy_all", symbol="torch:_foreach_copy_"),
    Upstream(patch="torch_operators.occupy_device", symbol="torch.cuda:_sleep"),
]
NO_PATCH = {"cpu_patches.is_needed"}
TESTED_BESIDE = {"warning_filters.install"}


def _name(upstream: Upstream) -> str:
    return f"{upstream.patch}-{upstream.symbol.rpartition(':')[2]}"


@pytest.mark.parametrize("upstream", RELIED_ON, ids=_name)
def test_upstream_has_what_a_patch_relies_on(upstream):
    check(upstream)


@pytest.mark.parametrize("upstream", RELIED_ON, ids=_name)
def test_a_symbol_that_is_gone_is_named_with_its_patch(upstream, monkeypatch):
    first, *rest = upstream.path
    if rest:  # a class of that name without the method
        monkeypatch.setattr(upstream.owner, first, type(first, (), {"__init__": None}))
        if rest == ["__init__"]:
            monkeypatch.delattr(upstream.owner, first)
    else:
        monkeypatch.delattr(upstream.owner, first)
    expect_sentence(upstream)


@pytest.mark.parametrize("upstream", [u for u in RELIED_ON if u.parameters or u.takes], ids=_name)
def test_other_parameters_are_named_with_their_patch(upstream, monkeypatch):
    def other(self, one, two): ...

    owner = upstream.owner
    for name in upstream.path[:-1]:
        owner = getattr(owner, name)
    monkeypatch.setattr(owner, upstream.path[-1], other)
    expect_sentence(upstream)


@pytest.mark.parametrize("upstream", [u for u in RELIED_ON if u.sets or u.mentions], ids=_name)
def test_other_code_is_named_with_its_patch(upstream, monkeypatch):
    owner = upstream.owner
    for name in upstream.path[:-1]:
        owner = getattr(owner, name)
    other = type(upstream.path[-1], (), {}) if upstream.sets else lambda: None
    monkeypatch.setattr(owner, upstream.path[-1], other)
    expect_sentence(upstream)


def expect_sentence(upstream: Upstream) -> None:
    with pytest.raises(AssertionError) as caught:
        check(upstream)
    sentence = str(caught.value)
    distribution, tested = TESTED[upstream.symbol.split(":")[0].split(".")[0]]
    assert sentence.startswith(f"{upstream.patch} (parallel/megatron_compat) relies on {upstream.symbol}, ")
    assert f"tested with {distribution} {tested};" in sentence


def test_every_function_of_the_room_says_what_it_relies_on():
    public = {
        f"{path.stem}.{node.name}"
        for path in ROOM.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert public - NO_PATCH - TESTED_BESIDE == {upstream.patch for upstream in RELIED_ON}
