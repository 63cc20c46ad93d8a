"""The next-token loss on answers, of SFT and of what PPO carries along."""

from collections.abc import Mapping, Sequence

import torch

from glm_rlhf.engine.data.store.examples import Demonstrations
from glm_rlhf.engine.scoring.record_batches import MicroBatch
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.sequence_outputs import answer_nll


class AnswerLikelihood:
    """The next-token loss on answers: −sum of log p(token t | tokens before t) / answer tokens of the step.

    The sum is over the tokens of answers, header and end id included; prompts are only read. The
    denominator counts them over all micro-batches and data-parallel ranks, so that every token of a step
    weighs alike, however it is dealt and packed.
    """

    prefix = "actor"
    sum_names = ("loss", "num_tokens", "nll", "entropy")

    def __init__(self, records: Demonstrations) -> None:
        self._answer_lengths = records.store.response_lengths

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return the answer tokens of these records."""
        return float(self._answer_lengths[list(numbers)].sum())

    def loss(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: MicroBatch, denominator: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's part of the loss, and its sums; see `update.Objective`."""
        mine = batch.share_of(model.topology)
        loss, statistics = answer_nll(model, hidden_TD, mine, batch.mask(), denominator=denominator)
        num_tokens, nll, entropy, _ = statistics.sums.double()
        return loss, torch.stack((loss.detach().double(), num_tokens, nll, entropy))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return the loss in nats a token, the entropy of the model's distribution, and the tokens."""
        return {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / max(sums["num_tokens"], 1.0),
            "num_answer_tokens": sums["num_tokens"],
        }
