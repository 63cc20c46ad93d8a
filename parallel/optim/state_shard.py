"""Some elements of a weight with what Adam keeps of them: the piece in which a checkpoint has them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from glm_rlhf.kernels.adam.adamw import join_master, split_master


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMaster:
    """fp32 weights that are kept as a bf16 weight and what its rounding left; see `kernels.adamw`."""

    weight: torch.Tensor
    """The model's own, bf16 [elements]."""
    remainder: torch.Tensor
    """int16 [elements]."""
    dtype = torch.float32
    """Of what they are together."""

    @property
    def shape(self) -> torch.Size:
        """Of what they are together."""
        return self.weight.shape

    def joined(self) -> torch.Tensor:
        """Return the fp32 weights, a new tensor [elements]."""
        return join_master(self.weight, self.remainder)

    def copy_(self, values: torch.Tensor) -> None:
        """Become `values`, of any type and device, [elements]."""
        weight, remainder = split_master(values.float())
        self.weight.copy_(weight)
        self.remainder.copy_(remainder)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShard:
    """Some consecutive elements of one flattened parameter of this rank."""

    name: str
    """The parameter's name in the whole model."""
    start: int
    """First element."""
    weight: torch.Tensor | SplitMaster
    """The elements: the very tensors that the optimizer changes, fp32; or a view of a frozen parameter."""
    is_trained: bool
    """False where the parameter is frozen."""
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Adam's, the very tensors; none of frozen weights, nor before the first step where Adam makes them."""
    optimizer: DistributedOptimizer | None = field(default=None, repr=False)
    """Where moments are put that are not there yet; None where they always are."""

    @property
    def stop(self) -> int:
        """Element behind the last."""
        return self.start + self.weight.shape.numel()
