"""The losses on records of a file: SFT on answers, a reward model's on pairs, DPO's on pairs."""

from collections.abc import Mapping, Sequence

import torch

from glm_rlhf.engine.config.training import DPOSection
from glm_rlhf.engine.data.store.examples import Demonstrations
from glm_rlhf.engine.objectives.losses import dpo_loss, pairwise_loss
from glm_rlhf.engine.objectives.pair_statistics import PAIR_SUMS, pair_metrics, pair_sums
from glm_rlhf.engine.scoring.packed_batches import (
    PackedBatch,
    Streams,
    answer_streams,
    weighted_answer_streams,
)
from glm_rlhf.engine.training.loss import Sums
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.sequence_outputs import answer_nll, last_token_values, sequence_logprobs


class SFTLoss:
    """The next-token loss on answers: −sum of log p(token t | tokens before t) / answer tokens of the step.

    The sum is over the tokens of answers, header and end id included; prompts are only read. The denominator
    counts them over all micro-batches and data-parallel ranks, so that every token of a step weighs alike,
    however it is dealt and packed.
    """

    prefix = "actor"
    sum_names: tuple[str, ...] = ("loss", "num_tokens", "nll", "entropy")
    num_maxima = 0

    def __init__(self, records: Demonstrations) -> None:
        self._answer_lengths = records.store.response_lengths

    def streams(self, lengths: Sequence[int], prompt_lengths: Sequence[int], num_tokens: int) -> Streams:
        """Return `mask`."""
        return answer_streams(lengths, prompt_lengths, num_tokens)

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return the answer tokens of these records."""
        return float(self._answer_lengths[list(numbers)].sum())

    def __call__(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, Sums]:
        """Return this rank's part of the loss, and its sums; see `Loss`."""
        shard = batch.shard(model.topology)
        loss, statistics = answer_nll(model, hidden_TD, shard, batch.streams["mask"], denominator=denominator)
        num_tokens, nll, entropy, _ = statistics.sums.double()
        return loss, Sums(sums=torch.stack((loss.detach().double(), num_tokens, nll, entropy)))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return the loss in nats per token, the entropy of the model's distribution, and the tokens."""
        return {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / max(sums["num_tokens"], 1.0),
            "num_answer_tokens": sums["num_tokens"],
        }


class RewardModelLoss:
    """The loss of a reward model, `losses.pairwise_loss`, divided by the pairs of the step.

    The score of an answer is the scalar at its last token: its end id, also of an empty text, or where it was
    cut the last token that is left. Both answers of a pair lie in one micro-batch, as two sequences that do
    not see each other. Two equal answers have equal scores and teach nothing but the anchor at zero.
    """

    prefix = "reward"
    sum_names: tuple[str, ...] = ("loss", *PAIR_SUMS)
    num_maxima = 0

    def __init__(self, *, l2_coef: float) -> None:
        self.l2_coef = l2_coef

    def streams(self, lengths: Sequence[int], prompt_lengths: Sequence[int], num_tokens: int) -> Streams:
        """Return `mask`."""
        return answer_streams(lengths, prompt_lengths, num_tokens)

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return the number of pairs."""
        return float(len(numbers))

    def __call__(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, Sums]:
        """Return the loss, alike on all context-parallel ranks, and its sums, on the first of them."""
        topology = model.topology
        scores = last_token_values(model, hidden_TD, batch.shard(topology))
        chosen_B, rejected_B = scores.unflatten(0, (-1, 2)).unbind(1)
        loss = pairwise_loss(chosen_B, rejected_B, l2_coef=self.l2_coef, denominator=denominator)
        lengths = batch.count("mask").unflatten(0, (-1, 2))
        sums = pair_sums(chosen_B, rejected_B, *lengths.unbind(1))
        sums_K = torch.cat((loss.detach().double()[None], sums))
        return loss, Sums(sums=sums_K if topology.cp_rank == 0 else torch.zeros_like(sums_K))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return the loss and what `pair_metrics` says."""
        return {"loss": sums["loss"], **pair_metrics(sums)}


class DPOLoss:
    """Direct preference optimisation, `losses.dpo_loss`, divided by the pairs of the step.

    An answer's log-probability is the sum over its tokens, header and end id included, of
    token_discount^i · log p(token i | tokens before i), i from 0: plain DPO with a discount of 1. With
    `length_normalised` it is divided by the sum of these weights.

    Source of the discount: Shao et al. 2025 (arXiv 2502.14340).
    """

    prefix = "actor"
    sum_names: tuple[str, ...] = (
        "loss",
        "num_pairs",
        "num_right",
        "chosen_reward",
        "rejected_reward",
        "chosen_logprob",
        "rejected_logprob",
    )
    num_maxima = 0

    def __init__(self, reference_scores: torch.Tensor, settings: DPOSection) -> None:
        """Take the reference's log-probabilities, fp32 [n, 2] by record number: chosen, rejected."""
        self.reference_scores = reference_scores
        self.settings = settings

    def streams(self, lengths: Sequence[int], prompt_lengths: Sequence[int], num_tokens: int) -> Streams:
        """Return `mask` and `weights`."""
        discount = self.settings.token_discount
        return weighted_answer_streams(lengths, prompt_lengths, num_tokens, discount=discount)

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return the number of pairs."""
        return float(len(numbers))

    def __call__(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, Sums]:
        """Return the loss, alike on all context-parallel ranks, and its sums, on the first of them."""
        topology, settings = model.topology, self.settings
        weights_T = batch.streams["weights"]
        logprobs = sequence_logprobs(model, hidden_TD, batch.shard(topology), weights_T)
        chosen_B, rejected_B = logprobs.unflatten(0, (-1, 2)).unbind(1)
        reference = self.reference_scores[list(batch.items)].to(logprobs.device)
        weights = torch.stack([part.sum() for part in batch.packed.split(weights_T)]).unflatten(0, (-1, 2))
        loss, chosen_rewards_B, rejected_rewards_B = dpo_loss(
            chosen_B,
            rejected_B,
            *reference.unbind(1),
            beta=settings.beta,
            denominator=denominator,
            chosen_weights_B=weights[:, 0],
            rejected_weights_B=weights[:, 1],
            length_normalised=settings.length_normalised,
            label_smoothing=settings.label_smoothing,
        )
        is_right_B = (
            (chosen_rewards_B > rejected_rewards_B).double()
            + (chosen_rewards_B >= rejected_rewards_B).double()
        ) / 2
        per_pair = (
            torch.ones_like(is_right_B),
            is_right_B,
            chosen_rewards_B,
            rejected_rewards_B,
            chosen_B.detach(),
            rejected_B.detach(),
        )
        sums_K = torch.stack([loss.detach().double(), *(values.double().sum() for values in per_pair)])
        return loss, Sums(sums=sums_K if topology.cp_rank == 0 else torch.zeros_like(sums_K))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return the loss, implicit rewards, how often they are right, and log-probabilities, as means.

        Of equal rewards half count as right.
        """
        pairs = sums["num_pairs"]
        chosen, rejected = sums["chosen_reward"], sums["rejected_reward"]
        totals = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": sums["num_right"],
            "logps/chosen": sums["chosen_logprob"],
            "logps/rejected": sums["rejected_logprob"],
        }
        means = {name: total / pairs if pairs else None for name, total in totals.items()}
        return {"loss": sums["loss"], "num_pairs": pairs, **means}
