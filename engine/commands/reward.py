"""The command `reward`: a model learns to score the preferred answer of a pair above the other."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from glm_rlhf.engine.build.models import DTYPES, find_tokenizer, layout_of
from glm_rlhf.engine.build.records import open_pairs
from glm_rlhf.engine.config.training import RewardConfig
from glm_rlhf.engine.objectives.losses import pairwise_loss
from glm_rlhf.engine.objectives.pair_statistics import PAIR_SUMS, calibration_table, pair_metrics, pair_sums
from glm_rlhf.engine.observe.calibration import write_calibration
from glm_rlhf.engine.runs.checkpoints import open_run_folder
from glm_rlhf.engine.scoring.record_batches import MicroBatch
from glm_rlhf.engine.training.run import held_out_of, run_training
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.sequence_outputs import last_token_values
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.weights.load import load_model


def run(config: RewardConfig) -> None:
    """Train a reward model on pairs; every rank of the launch calls it.

    It starts from a policy, whose vocabulary head gives way to a new scalar head, or from a reward model.
    The run folder gets metrics, `calibration/step_N.json` of each evaluation, and checkpoints as Hugging
    Face folders that `score` and `label` read. See `PairPreference` for the loss.

    Raises:
        ValueError: anything that the user has to mend.
    """
    axes = config.parallel
    with open_topology(layout_of(axes), timeout_s=axes.timeout_s, seed=config.run.seed) as topology:
        checkpoint = open_run_folder(config, topology)
        chunks, created = load_model(
            config.model.path,
            topology,
            role="reward",
            dtype=DTYPES[config.train.dtype],
            seed=config.run.seed,
            recompute_layers=config.train.recompute_layers,
        )
        if created and topology.is_main_rank:
            sys.stderr.write(f"{config.model.path} is a policy: the scalar head starts new\n")
        with raise_on_all_ranks("reading the tokenizer"):
            tokenizer = find_tokenizer(config, chunks[0].glm)
        records, held_out = open_pairs(
            config.data, config.run.output, tokenizer, chunks[0].glm, seed=config.run.seed, topology=topology
        )
        objective = PairPreference(l2_coef=config.reward.l2_coef)

        def write_table(step: int, sums: Mapping[str, float]) -> None:
            write_calibration(Path(config.run.output) / "calibration", step, calibration_table(sums))

        held = held_out_of(config, held_out, objective, write_table)
        run_training(config, chunks, objective, records, held=held, topology=topology, checkpoint=checkpoint)


class PairPreference:
    """The loss of a reward model, `losses.pairwise_loss`, divided by the pairs of the step.

    The score of an answer is the scalar at its last token: its end id, also of an empty text, or where it was
    cut the last token that is left. Both answers of a pair lie in one micro-batch, as two sequences that do
    not see each other. Two equal answers have equal scores and teach nothing but the anchor at zero.
    """

    prefix = "reward"
    sum_names = ("loss", *PAIR_SUMS)

    def __init__(self, *, l2_coef: float) -> None:
        self.l2_coef = l2_coef

    def denominator(self, numbers: Sequence[int]) -> float:
        """Return the number of pairs."""
        return float(len(numbers))

    def loss(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: MicroBatch, denominator: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, alike on all context-parallel ranks, and its sums, on the first of them."""
        topology = model.topology
        scores = last_token_values(model, hidden_TD, batch.share_of(topology))
        chosen_B, rejected_B = scores.unflatten(0, (-1, 2)).unbind(1)
        loss = pairwise_loss(chosen_B, rejected_B, l2_coef=self.l2_coef, denominator=denominator)
        lengths = torch.tensor(batch.answer_lengths, device=scores.device).unflatten(0, (-1, 2))
        sums = pair_sums(chosen_B, rejected_B, *lengths.unbind(1))
        sums_K = torch.cat((loss.detach().double()[None], sums))
        return loss, sums_K if topology.cp_rank == 0 else torch.zeros_like(sums_K)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return the loss and what `pair_metrics` says."""
        return {"loss": sums["loss"], **pair_metrics(sums)}
