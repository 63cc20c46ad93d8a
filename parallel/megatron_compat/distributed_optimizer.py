"""What Megatron-core's distributed optimizer holds on this rank, and where in the parameters it lies.

It cuts the flattened parameters of a rank into dp × cp stretches and keeps fp32 weights and Adam's state of
its own stretch. Its own checkpoint format does not survive a change of layout, so the tensors are read here.
"""

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def sub_optimizers(outer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Return the optimizers behind one, those apart that have nothing to train."""
    chained = getattr(outer, "chained_optimizers", [outer])
    return [optimizer for optimizer in chained if not getattr(optimizer, "is_stub_optimizer", False)]


def owns_part_of(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> bool:
    """Return whether this rank's stretch has elements of a parameter."""
    return parameter in optimizer.model_param_gbuf_map


def first_element(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> int:
    """Return where in a flattened parameter the elements begin that this rank's stretch has of it."""
    return optimizer._get_model_param_range_map(parameter)["param"].start


def main_weights(optimizer: DistributedOptimizer) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Return the fp32 weights that the optimizer steps, flat, by the model's parameter.

    Its groups list the parameters that are fp32 in the model before the others, so that a parameter's place
    in `model_param_group_index_map` is another one in a bf16 model with an fp32 value head.
    """
    return {
        parameter: main
        for models, mains in (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        )
        for group, main_group in zip(models, mains, strict=True)
        for parameter, main in zip(group, main_group, strict=True)
    }


def copy_main_weights_to_model(optimizer: DistributedOptimizer) -> None:
    """Round this rank's stretch of the fp32 weights into the model; a gather over dp × cp has to follow."""
    optimizer._copy_main_params_to_model_params()


def state_tensors(outer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Yield the tensors that are stepped and what Adam keeps of them, its counters of steps apart."""
    for optimizer in sub_optimizers(outer):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            for main in group["params"]:
                for tensor in (main, *inner.state.get(main, {}).values()):
                    if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
                        yield tensor
