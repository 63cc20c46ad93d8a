"""The command `dpo`: a policy learns to prefer the chosen answer of a pair, tied to a reference."""

import sys
import time
from collections.abc import Mapping, Sequence

import torch

from glm_rlhf.engine.build.models import DTYPES, find_tokenizer, layout_of, load_other
from glm_rlhf.engine.build.records import open_pairs
from glm_rlhf.engine.config.training import DPOConfig, DPOSection
from glm_rlhf.engine.data.store.examples import Pairs
from glm_rlhf.engine.objectives.losses import dpo_loss
from glm_rlhf.engine.runs.checkpoints import open_run_folder
from glm_rlhf.engine.scoring.pair_logprobs import score_reference
from glm_rlhf.engine.scoring.record_batches import MicroBatch
from glm_rlhf.engine.training.run import held_out_of, run_training, sampler_of
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.sequence_outputs import sequence_logprobs
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.weights.load import load_model


def run(config: DPOConfig) -> None:
    """Train a policy on pairs; every rank of the launch calls it.

    The reference scores every pair that the run will see once, before the first step; then its weights are
    not needed any more. The run folder gets metrics, checkpoints to go on from, and Hugging Face folders. See
    `PairLikelihood` for the loss.

    Raises:
        ValueError: anything that the user has to mend.
    """
    axes = config.parallel
    with open_topology(layout_of(axes), timeout_s=axes.timeout_s, seed=config.run.seed) as topology:
        checkpoint = open_run_folder(config, topology)
        chunks, _ = load_model(
            config.model.path,
            topology,
            dtype=DTYPES[config.train.dtype],
            recompute_layers=config.train.recompute_layers,
        )
        with raise_on_all_ranks("reading the tokenizer"):
            tokenizer = find_tokenizer(config, chunks[0].glm)
        records, held_out = open_pairs(
            config.data, config.run.output, tokenizer, chunks[0].glm, seed=config.run.seed, topology=topology
        )
        objectives = _with_reference(config, chunks, records, held_out, topology)
        held = held_out_of(config, held_out, objectives[-1])
        run_training(
            config, chunks, objectives[0], records, held=held, topology=topology, checkpoint=checkpoint
        )


def _with_reference(
    config: DPOConfig,
    chunks: Sequence[GLMModel],
    records: Pairs,
    held_out: Pairs | None,
    topology: Topology,
) -> list["PairLikelihood"]:
    """Return the objective on the records, and on those held out if there are any."""
    reference = chunks
    if config.reference.path is not None:
        dtype, glm = DTYPES[config.train.dtype], chunks[0].glm
        reference, _ = load_other(
            "reference.path", config.reference.path, topology, role="reference", dtype=dtype, beside=glm
        )
    sampler, start = sampler_of(config, records), time.monotonic()
    seen = {number for step in range(config.train.steps) for number in sampler.batch(step)}
    wanted = [(records, sorted(seen))]
    if held_out is not None:
        wanted.append((held_out, list(range(min(len(held_out), config.data.eval_records)))))
    objectives = []
    for pairs, numbers in wanted:
        scores = score_reference(
            reference,
            pairs,
            numbers,
            discount=config.dpo.token_discount,
            max_tokens=config.train.micro_batch_tokens,
            topology=topology,
        )
        objectives.append(PairLikelihood(scores, config.dpo))
    if topology.is_main_rank:
        sys.stderr.write(
            f"the reference scored {sum(len(numbers) for _, numbers in wanted)} pairs in "
            f"{time.monotonic() - start:.1f} s\n"
        )
    return objectives


class PairLikelihood:
    """Direct preference optimisation, `losses.dpo_loss`, divided by the pairs of the step.

    An answer's log-probability is the sum over its tokens, header and end id included, of
    token_discount^i · log p(token i | tokens before i), i from 0: plain DPO with a discount of 1. With
    `length_normalised` it is divided by the sum of these weights.

    Source of the discount: Shao et al. 2025 (arXiv 2502.14340).
    """

    prefix = "actor"
    sum_names = (
        "loss",
        "num_pairs",
        "num_right",
        "chosen_reward",
        "rejected_reward",
        "chosen_logprob",
        "rejected_logprob",
    )

    def __init__(self, reference_scores: torch.Tensor, settings: DPOSection) -> None:
        """Take the reference's log-probabilities, fp32 [n, 2] by record number: chosen, rejected."""
        self.reference_scores = reference_scores
        self.settings = settings

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return the number of pairs."""
        return float(len(numbers))

    def loss(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: MicroBatch, denominator: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, alike on all context-parallel ranks, and its sums, on the first of them."""
        topology, settings = model.topology, self.settings
        weights_T = batch.weights(settings.token_discount)
        logprobs = sequence_logprobs(model, hidden_TD, batch.share_of(topology), weights_T)
        chosen_B, rejected_B = logprobs.unflatten(0, (-1, 2)).unbind(1)
        reference = self.reference_scores[list(batch.records)].to(logprobs.device)
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
        return loss, sums_K if topology.cp_rank == 0 else torch.zeros_like(sums_K)

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
