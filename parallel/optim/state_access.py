"""The training state that a rank owns: fp32 weights and Adam moments, in flat shards of parameters.

The distributed optimizer splits the concatenated parameters of a rank into dp × cp ranges and keeps fp32
weights and moments of its own range only; the optimizer in backward splits each parameter. A `StateShard` is
a rank's part of one parameter, so that every rank can save and restore exactly what it owns, without
communication.
"""

from collections.abc import Iterator, Mapping

import torch

from glm_rlhf.parallel.megatron_compat.distributed_optimizer import (
    copy_main_weights_to_model,
    first_element,
    main_weights,
    owns_part_of,
    sub_optimizers,
)
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState, InBackwardState
from glm_rlhf.parallel.optim.state_shard import StateShard
from glm_rlhf.parallel.optim.training_state import TrainingState
from glm_rlhf.parallel.storage.checkpoint_manifest import ADAM_MOMENTS


def parts_of(state: AnyTrainingState) -> Iterator[StateShard]:
    """Yield the shards that this rank owns, in the model's order.

    Data- and context-parallel ranks split a trained parameter's elements without overlap; each of them has
    the whole of a frozen one. Offloaded state is prefetched first.
    """
    if isinstance(state, InBackwardState):
        trained = state.parts()
    else:
        state.wait_for_state()
        trained = {part.name: part for part in _distributed_parts(state)}
    for chunk in state.bare_chunks:
        for name, parameter in chunk.named_weights():
            if not parameter.requires_grad:
                yield StateShard(name=name, start=0, weight=parameter.detach().view(-1), is_trained=False)
            elif name in trained:
                yield trained[name]


def _distributed_parts(state: TrainingState) -> Iterator[StateShard]:
    """Yield the shards of trained parameters, for Megatron-core's optimizers."""
    for optimizer in sub_optimizers(state.optimizer):
        main_of = main_weights(optimizer)
        for chunk in state.bare_chunks:
            for name, parameter in chunk.named_weights():
                if owns_part_of(optimizer, parameter):
                    main = main_of[parameter]
                    moments = optimizer.optimizer.state.get(main, {})
                    yield StateShard(
                        name=name,
                        start=first_element(optimizer, parameter),
                        weight=main,
                        is_trained=True,
                        moments={kind: moments[kind] for kind in ADAM_MOMENTS if kind in moments},
                        optimizer=optimizer,
                    )


def num_steps_of(state: AnyTrainingState) -> int:
    """Return the number of steps that Adam has taken; 0 on a rank that owns no trained parameter."""
    if isinstance(state, InBackwardState):
        return state.num_steps
    state.wait_for_state()
    for optimizer in sub_optimizers(state.optimizer):
        inner = optimizer.optimizer
        for parameter_state in inner.state.values():
            if "step" in parameter_state:
                return int(parameter_state["step"])
        for group in inner.param_groups:
            if "step" in group and group["params"]:
                return int(group["step"])
    return 0


def gradient_squares_of(state: AnyTrainingState) -> dict[str, float]:
    """Return the squared norms by which an optimizer in backward clips its next step; else nothing."""
    return state.gradient_squares if isinstance(state, InBackwardState) else {}


def set_moments(part: StateShard, moments: Mapping[str, torch.Tensor], num_steps: int) -> None:
    """Set the Adam moments of a shard, fp32 tensors that the optimizer may keep, and its step count."""
    if part.optimizer is None:
        for name, values in part.moments.items():
            values.copy_(moments[name])
        return
    inner = part.optimizer.optimizer
    main = part.weight
    inner.state[main] = {name: moments[name].to(main.device) for name in ADAM_MOMENTS}
    if type(inner).__module__.startswith("torch."):
        inner.state[main]["step"] = torch.tensor(float(num_steps), dtype=torch.float32)
        return
    for group in inner.param_groups:  # Transformer Engine's and apex's Adam count steps per group
        group["step"] = num_steps


def resume_from(state: AnyTrainingState, num_steps: int, gradient_squares: Mapping[str, float]) -> None:
    """Continue from restored shards: gather their weights over dp; every rank calls this.

    Args:
        state: whose shards were restored.
        num_steps: optimizer steps taken before.
        gradient_squares: norms by which an optimizer in backward clips its next step; else empty.
    """
    if isinstance(state, InBackwardState):
        state.resume_from(num_steps, gradient_squares)
        return
    for optimizer in sub_optimizers(state.optimizer):
        copy_main_weights_to_model(optimizer)
    for chunk in state.chunks:
        chunk.start_param_sync(force_sync=True)
