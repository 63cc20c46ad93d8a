"""A shard of a weight with its Adam moments: the unit in which a checkpoint stores training state."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from glm_rlhf.kernels.adam.adamw import join_master, split_master


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMaster:
    """fp32 weights stored as a bf16 weight and the remainder of its rounding; see `kernels.adamw`."""

    weight: torch.Tensor
    """The model's parameter, bf16 [elements]."""
    remainder: torch.Tensor
    """int16 [elements]."""
    dtype = torch.float32
    """Dtype of the joined weights."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the joined weights."""
        return self.weight.shape

    def joined(self) -> torch.Tensor:
        """Return the fp32 weights, a new tensor [elements]."""
        return join_master(self.weight, self.remainder)

    def copy_(self, values: torch.Tensor) -> None:
        """Copy from `values` [elements], of any dtype and device."""
        weight, remainder = split_master(values.float())
        self.weight.copy_(weight)
        self.remainder.copy_(remainder)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShard:
    """Consecutive elements of one flattened parameter of this rank."""

    name: str
    """The parameter's name in the whole model."""
    start: int
    """First element."""
    weight: torch.Tensor | SplitMaster
    """The elements: the tensor that the optimizer updates, fp32; or a view of a frozen parameter."""
    is_trained: bool
    """False where the parameter is frozen."""
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Adam moments, the optimizer's tensors; empty for frozen weights and before moments are created."""
    optimizer: DistributedOptimizer | None = field(default=None, repr=False)
    """The optimizer that takes restored moments, if it creates them in its first step; None otherwise."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.weight.shape.numel()
