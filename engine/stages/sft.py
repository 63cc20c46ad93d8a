"""The command `sft`: a policy learns to give the answers of demonstrations."""

from collections.abc import Mapping, Sequence

import torch

from glm_rlhf.engine.config_training import SFTConfig
from glm_rlhf.engine.stages.micro_batches import MicroBatch
from glm_rlhf.engine.stages.model_inputs import DTYPES, find_tokenizer, layout_of
from glm_rlhf.engine.stages.run_checkpoints import claim_folder
from glm_rlhf.engine.stages.training_data import open_demonstrations
from glm_rlhf.engine.stages.training_records import Demonstrations
from glm_rlhf.engine.stages.training_run import held_of, run_training
from glm_rlhf.parallel.agreement import agreed
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.load import load_model
from glm_rlhf.parallel.sequence_heads import answer_nll
from glm_rlhf.parallel.topology import topology


def run(config: SFTConfig) -> None:
    """Train a policy on demonstrations; every rank of the launch calls it.

    The run folder gets metrics, checkpoints to go on from, and Hugging Face folders. See `AnswerLikelihood`
    for the loss.

    Raises:
        ValueError: anything that the user has to mend.
    """
    axes = config.parallel
    with topology(layout_of(axes), timeout_s=axes.timeout_s, seed=config.run.seed) as place:
        origin = claim_folder(config, place)
        chunks, _ = load_model(
            config.model.path,
            place,
            dtype=DTYPES[config.train.dtype],
            recompute_layers=config.train.recompute_layers,
        )
        with agreed("reading the tokenizer"):
            tokenizer = find_tokenizer(config, chunks[0].glm)
        records, held_out = open_demonstrations(
            config.data, config.run.output, tokenizer, chunks[0].glm, place=place
        )
        run_training(
            config,
            chunks,
            AnswerLikelihood(records),
            records,
            held=held_of(config, held_out, AnswerLikelihood(held_out)) if held_out is not None else None,
            place=place,
            origin=origin,
        )


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
