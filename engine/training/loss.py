"""What a role minimises: the one protocol of losses, and a role's part in an optimizer step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from glm_rlhf.engine.scoring.packed_batches import PackedBatch, Streams
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState


class Statistics(Protocol):
    """What a loss counts in a micro-batch."""

    @property
    def sums(self) -> torch.Tensor:
        """[K], in the order of `Loss.sum_names`: added up over micro-batches and ranks."""

    @property
    def maxima(self) -> torch.Tensor | None:
        """fp32 [`Loss.num_maxima`], whose largest over micro-batches and ranks counts; None for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Statistics that are sums and nothing else."""

    sums: torch.Tensor
    """fp64 [K]."""

    @property
    def maxima(self) -> None:
        """None."""
        return None


class Loss(Protocol):
    """A sum over a global denominator, so that it depends neither on packing nor on the layout."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of the statistics' sums."""

    @property
    def num_maxima(self) -> int:
        """Length of the statistics' maxima; 0 where they have none."""

    def __call__(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, Statistics]:
        """Return (this rank's part of the loss, statistics of this rank's part of the micro-batch).

        Called on the last pipeline stage by all its tensor- and context-parallel ranks. Tensor-parallel ranks
        return equal statistics; those of context- and data-parallel ranks add up.

        Args:
            model: the last chunk of the role's model.
            hidden_TD: what it returned for this rank's rows.
            batch: the micro-batch.
            denominator: of the whole step, over all micro-batches and data-parallel ranks.
        """


class RecordLoss(Loss, Protocol):
    """A loss on records of a file: what SFT, reward models and DPO minimise."""

    @property
    def prefix(self) -> str:
        """First part of its metrics' names in training, such as `actor`."""

    def streams(self, lengths: Sequence[int], prompt_lengths: Sequence[int], num_tokens: int) -> Streams:
        """Return the per-token tensors that it reads, on the host; see `packed_batches.StreamsOfRecords`."""

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return what the sum over these records is divided by, the same on every rank."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return metrics by name without prefix, of sums over all ranks; None where one is not defined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """A loss on some micro-batches, one summand of what a role minimises in a step."""

    loss: Loss
    """The loss."""
    batches: Sequence[PackedBatch]
    """This data-parallel rank's micro-batches; none where it has no share."""
    denominator: float
    """Of the whole step, over all data-parallel ranks."""
    name_items: Callable[[Sequence[int]], str]
    """Names items of the batches in messages, such as `answers 3, 5`."""
    weight: float = 1.0
    """Factor of the loss; its statistics are unweighted."""

    def __call__(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, Statistics]:
        """Return the weighted loss of a micro-batch, and its statistics."""
        loss, statistics = self.loss(model, hidden_TD, batch, self.denominator)
        return (loss if self.weight == 1.0 else self.weight * loss), statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A role's part in an optimizer step."""

    role: str
    """Its name, such as policy or critic."""
    state: AnyTrainingState
    """Model and optimizer, the learning rate set."""
    terms: tuple[LossTerm, ...]
    """What it minimises: the sum of these."""
