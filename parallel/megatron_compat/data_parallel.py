"""What Megatron-core's data-parallel wrapper holds: buffers of weights and gradients, and hooks.

The wrapper names none of it as an interface, but training has to empty the buffers, and to free the hooks.
"""

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel


def gradient_buffers(wrapper: DistributedDataParallel) -> list[torch.Tensor]:
    """Return the flat buffers that the gradients of a wrapped chunk are views of."""
    return [buffer.grad_data for buffer in wrapper.buffers + wrapper.expert_parallel_buffers]


def weight_buffers(wrapper: DistributedDataParallel) -> list[torch.Tensor]:
    """Return the flat buffers that the trained weights of a wrapped chunk are views of."""
    return [buffer.param_data for buffer in wrapper.buffers + wrapper.expert_parallel_buffers]


def cut_reference_cycles(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Remove what ties wrappers that are no longer used and their models to each other in circles.

    The nodes of autograd on which a wrapper hangs its hooks hold it, and it the nodes: a circle through C++
    that no collector sees, which would keep weights, gradients and process groups of every training state
    until the process ends. The others, of overlap, a collector breaks, but late: gloo's threads poll until
    it does.
    """
    for wrapper in wrappers:
        wrapper.grad_accs.clear()
        if wrapper.remove_forward_pre_hook_handles:
            wrapper.disable_forward_pre_hook(param_sync=False)
        config = wrapper.config
        functions = config.no_sync_func if isinstance(config.no_sync_func, list) else [config.no_sync_func]
        if wrapper.no_sync in functions:  # not those of a state that has wrapped the model since
            config.no_sync_func = None
