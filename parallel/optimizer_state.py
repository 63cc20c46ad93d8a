"""What a rank owns of a model in training: fp32 weights and Adam's averages, in flat parts of parameters.

The distributed optimizer cuts the flattened parameters of a rank into dp × cp stretches and keeps fp32
weights and averages of its own stretch only. A part is one parameter's share of that stretch, so that every
rank can write, and fill again, exactly what it has; nothing is communicated for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from glm_rlhf.parallel.checkpoint_manifest import AVERAGES
from glm_rlhf.parallel.optimizer import TrainingState


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some consecutive elements of one flattened parameter of this rank."""

    ours: str
    """The parameter's name in the whole model."""
    start: int
    """First element."""
    weight: torch.Tensor
    """The elements: the very tensor that the optimizer changes, fp32; or a view of a frozen parameter."""
    optimizer: DistributedOptimizer | None = field(repr=False)
    """What trains the parameter; None where it is frozen."""

    @property
    def stop(self) -> int:
        """Element behind the last."""
        return self.start + self.weight.numel()


def parts_of(state: TrainingState) -> Iterator[Part]:
    """Yield the parts that this rank owns, in the model's order.

    Data- and context-parallel ranks share a trained parameter's elements without overlap; each of them has
    the whole of a frozen one. What is parked is brought back first.
    """
    state.bring_back()
    optimizers = _optimizers(state)
    for chunk in state.bare_chunks:
        for name, parameter in chunk.named_weights():
            if not parameter.requires_grad:
                yield Part(ours=name, start=0, weight=parameter.detach().view(-1), optimizer=None)
                continue
            for optimizer in optimizers:
                if parameter in optimizer.model_param_gbuf_map:
                    yield Part(
                        ours=name,
                        start=optimizer._get_model_param_range_map(parameter)["param"].start,
                        weight=_main_parameter(optimizer, parameter),
                        optimizer=optimizer,
                    )


def averages_of(part: Part) -> dict[str, torch.Tensor]:
    """Return Adam's averages of a part; nothing before the first step, and of frozen weights."""
    if part.optimizer is None:
        return {}
    found = part.optimizer.optimizer.state.get(part.weight, {})
    return {name: found[name] for name in AVERAGES if name in found}


def num_steps_of(state: TrainingState) -> int:
    """Return the steps that Adam has taken, 0 also on a rank that owns nothing that is trained."""
    state.bring_back()
    for optimizer in _optimizers(state):
        inner = optimizer.optimizer
        for found in inner.state.values():
            if "step" in found:
                return int(found["step"])
        for group in inner.param_groups:
            if "step" in group and group["params"]:
                return int(group["step"])
    return 0


def set_averages(part: Part, averages: dict[str, torch.Tensor], num_steps: int) -> None:
    """Give Adam its averages of a part, fp32 tensors that it keeps, and the steps behind them."""
    inner = part.optimizer.optimizer
    main = part.weight
    inner.state[main] = {name: averages[name].to(main.device) for name in AVERAGES}
    if type(inner).__module__.startswith("torch."):
        inner.state[main]["step"] = torch.tensor(float(num_steps), dtype=torch.float32)
        return
    for group in inner.param_groups:  # Transformer Engine's and apex's Adam count once a group
        group["step"] = num_steps


def refresh_weights(state: TrainingState) -> None:
    """Round the fp32 weights to the model's own and gather them over dp; every rank calls this."""
    for optimizer in _optimizers(state):
        optimizer._copy_main_params_to_model_params()
    for chunk in state.chunks:
        chunk.start_param_sync(force_sync=True)


def _optimizers(state: TrainingState) -> Sequence[DistributedOptimizer]:
    outer = state.optimizer
    chained = getattr(outer, "chained_optimizers", [outer])
    return [optimizer for optimizer in chained if not getattr(optimizer, "is_stub_optimizer", False)]


def _main_parameter(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    group, place = optimizer.model_param_group_index_map[parameter]
    return optimizer.optimizer.param_groups[group]["params"][place]
