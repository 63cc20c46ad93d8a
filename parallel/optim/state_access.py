"""What a rank owns of a model in training: fp32 weights and Adam's moments, in flat parts of parameters.

The distributed optimizer cuts the flattened parameters of a rank into dp × cp stretches and keeps fp32
weights and moments of its own stretch only; the optimizer in backward cuts each parameter. A part is what
a rank has of one parameter, so that every rank can write, and fill again, exactly what it has; nothing is
communicated for it.
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
    """Yield the parts that this rank owns, in the model's order.

    Data- and context-parallel ranks share a trained parameter's elements without overlap; each of them has
    the whole of a frozen one. What is parked is brought back first.
    """
    if isinstance(state, InBackwardState):
        found = state.parts()
    else:
        state.bring_back_state()
        found = {part.name: part for part in _distributed_parts(state)}
    for chunk in state.bare_chunks:
        for name, parameter in chunk.named_weights():
            if not parameter.requires_grad:
                yield StateShard(name=name, start=0, weight=parameter.detach().view(-1), is_trained=False)
            elif name in found:
                yield found[name]


def _distributed_parts(state: TrainingState) -> Iterator[StateShard]:
    """Yield the parts of what is trained, for Megatron-core's optimizers."""
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
    """Return the steps that Adam has taken, 0 also on a rank that owns nothing that is trained."""
    if isinstance(state, InBackwardState):
        return state.num_steps
    state.bring_back_state()
    for optimizer in sub_optimizers(state.optimizer):
        inner = optimizer.optimizer
        for found in inner.state.values():
            if "step" in found:
                return int(found["step"])
        for group in inner.param_groups:
            if "step" in group and group["params"]:
                return int(group["step"])
    return 0


def gradient_squares_of(state: AnyTrainingState) -> dict[str, float]:
    """Return what an optimizer in backward clips its next step by; the ordinary one needs nothing."""
    return state.gradient_squares if isinstance(state, InBackwardState) else {}


def set_moments(part: StateShard, moments: Mapping[str, torch.Tensor], num_steps: int) -> None:
    """Give Adam its moments of a part, fp32 tensors that it may keep, and the steps behind them."""
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
    for group in inner.param_groups:  # Transformer Engine's and apex's Adam count once a group
        group["step"] = num_steps


def resume_from(state: AnyTrainingState, num_steps: int, gradient_squares: Mapping[str, float]) -> None:
    """Continue with parts that were filled, their weights gathered over dp; every rank calls this.

    Args:
        state: whose parts were filled.
        num_steps: steps behind them.
        gradient_squares: what an optimizer in backward clips its next step by; empty after the ordinary one.
    """
    if isinstance(state, InBackwardState):
        state.resume_from(num_steps, gradient_squares)
        return
    for optimizer in sub_optimizers(state.optimizer):
        copy_main_weights_to_model(optimizer)
    for chunk in state.chunks:
        chunk.start_param_sync(force_sync=True)
