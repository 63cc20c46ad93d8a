"""Weights and gradients of a wrapped chunk are views of the buffers, and an unused wrapper is freed."""

import gc
import weakref

import pytest
from tiny_training import Case, make_batches, make_chunks, train_step
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat.data_parallel import gradient_buffers, weight_buffers
from glm_rlhf.parallel.optim.in_backward import training_state

WRAPPER = "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel"
BUFFER = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer"


def test_every_weight_and_gradient_lies_in_a_buffer(topology):
    case = Case()
    state = training_state(make_chunks(case, topology), case.settings, topology=topology)
    (wrapper,) = state.chunks
    weights, gradients = (
        {buffer.untyped_storage().data_ptr() for buffer in buffers}
        for buffers in (weight_buffers(wrapper), gradient_buffers(wrapper))
    )
    for name, weight in state.bare_chunks[0].named_weights():
        lies = weight.untyped_storage().data_ptr() in weights
        assert lies, moved(Upstream(patch="data_parallel.weight_buffers", symbol=BUFFER), f"lacks {name}")
        lies = weight.main_grad.untyped_storage().data_ptr() in gradients
        assert lies, moved(Upstream(patch="data_parallel.gradient_buffers", symbol=BUFFER), f"lacks {name}")


def trained(topology, *, overlaps: bool) -> weakref.ref:
    """A wrapper with nothing left but what it is tied to itself."""
    case = Case()
    state = training_state(
        make_chunks(case, topology), case.settings, topology=topology, overlap_communication=overlaps
    )
    train_step(case, state, make_batches(case, topology), topology)
    return weakref.ref(state.chunks[0])


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_wrapper_that_is_no_longer_used_is_freed_at_once(topology, overlaps):
    gc.collect()
    gc.disable()
    try:
        wrapper = trained(topology, overlaps=overlaps)
        upstream = Upstream(patch="data_parallel.cut_reference_cycles", symbol=WRAPPER)
        assert wrapper() is None, moved(upstream, "is held by another reference")
    finally:
        gc.enable()
