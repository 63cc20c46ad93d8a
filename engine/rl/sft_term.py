"""The next-token loss on demonstrations that PPO carries along, against forgetting."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.data.store.examples import Demonstrations
from glm_rlhf.engine.scoring.record_batches import MicroBatch, take_share
from glm_rlhf.engine.training.answer_likelihood import AnswerLikelihood
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTTerm:
    """What one optimizer step of the policy adds to its loss: coef · CE(demonstrations)."""

    objective: AnswerLikelihood
    """The loss."""
    batches: tuple[MicroBatch, ...]
    """This data-parallel rank's demonstrations of the step; none where it has no share."""
    num_answer_tokens: float
    """Answer tokens of the step's demonstrations over all data-parallel ranks: the loss's denominator."""
    coef: float
    """Weight beside the policy's own loss."""

    def loss(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (this rank's weighted part of the loss, unweighted fp64 sums of `AnswerLikelihood`)."""
        loss, sums = self.objective.loss(model, hidden_TD, batch, self.num_answer_tokens)
        return self.coef * loss, sums


class DemonstrationStream:
    """Owns how far PPO has read its demonstrations: each optimizer step of the policy takes the next ones.

    Which they are follows from the seed and the number of steps before, not from the layout.
    """

    def __init__(
        self, records: Demonstrations, *, batch_size: int, coef: float, micro_batch_tokens: int, seed: int
    ) -> None:
        """Keep the settings.

        Args:
            records: the demonstrations.
            batch_size: of them an optimizer step, over all ranks.
            coef: weight of the loss on them.
            micro_batch_tokens: of a micro-batch.
            seed: of their order.

        Raises:
            ValueError: fewer demonstrations than a batch, or no weight.
        """
        if not coef > 0:
            raise ValueError(f"ppo.sft_coef is {coef}: with demonstrations to learn from it must be above 0")
        if len(records) < batch_size:
            raise ValueError(
                f"{records.path} gives {len(records)} demonstrations, an optimizer step takes {batch_size}: "
                f"set train.sft_batch_size to {len(records)} or less, or give more demonstrations"
            )
        self.records, self.coef, self.micro_batch_tokens = records, coef, micro_batch_tokens
        self.num_steps = 0
        self._sampler = BatchSampler(len(records), batch_size, seed=seed)
        self._objective = AnswerLikelihood(records)

    def take(self, topology: Topology) -> SFTTerm:
        """Return the next step's term; every rank calls this, nothing is communicated."""
        numbers: Sequence[int] = self._sampler.batch(self.num_steps)
        self.num_steps += 1
        batches = take_share(self.records, numbers, max_tokens=self.micro_batch_tokens, topology=topology)
        return SFTTerm(
            objective=self._objective,
            batches=tuple(batches),
            num_answer_tokens=self._objective.denominator(numbers),
            coef=self.coef,
        )
