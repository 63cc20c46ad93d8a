"""The next-token loss on demonstrations that the policy's steps carry along (PPO-ptx), against forgetting."""

from collections.abc import Sequence

from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.data.store.examples import Demonstrations
from glm_rlhf.engine.scoring.packed_batches import batches_of_records
from glm_rlhf.engine.training.loss import LossTerm
from glm_rlhf.engine.training.record_losses import SFTLoss
from glm_rlhf.parallel.runtime.topology import Topology


class DemonstrationStream:
    """Owns how far a run has read its demonstrations: each optimizer step of the policy takes the next ones.

    Which they are follows from the seed and the number of steps before, not from the layout.
    """

    def __init__(
        self, records: Demonstrations, *, batch_size: int, coef: float, micro_batch_tokens: int, seed: int
    ) -> None:
        """Keep the settings.

        Args:
            records: the demonstrations.
            batch_size: demonstrations per optimizer step, over all ranks.
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
        self._loss = SFTLoss(records)

    def take(self, topology: Topology) -> LossTerm:
        """Return the next step's coef · CE(demonstrations); every rank calls this, nothing is
        communicated."""
        numbers: Sequence[int] = self._sampler.batch(self.num_steps)
        self.num_steps += 1
        batches = batches_of_records(
            self.records,
            numbers,
            max_tokens=self.micro_batch_tokens,
            topology=topology,
            streams=self._loss.streams,
        )
        return LossTerm(
            loss=self._loss,
            batches=batches,
            denominator=self._loss.denominator(numbers),
            name_items=lambda _: "demonstrations",
            weight=self.coef,
        )
