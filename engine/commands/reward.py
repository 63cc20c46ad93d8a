"""The command `reward`: a model learns to score the preferred answer of a pair above the other."""

from collections.abc import Mapping
from pathlib import Path

from glm_rlhf.engine.build.models import load_main_model
from glm_rlhf.engine.build.records import open_pairs
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.config.training import RewardConfig
from glm_rlhf.engine.objectives.pair_statistics import calibration_table
from glm_rlhf.engine.observe.best_effort import without_failing
from glm_rlhf.engine.observe.calibration import write_calibration
from glm_rlhf.engine.runs.run_folder import open_run_folder
from glm_rlhf.engine.training.record_losses import RewardModelLoss
from glm_rlhf.engine.training.run import held_out_of, run_training
from glm_rlhf.parallel.runtime.log import log


def run(config: RewardConfig) -> None:
    """Train a reward model on pairs; every rank of the launch calls it.

    It starts from a policy, whose vocabulary head gives way to a new scalar head, or from a reward model.
    The run folder gets metrics, `calibration/step_N.json` of each evaluation, and checkpoints as Hugging
    Face folders that `score` and `label` read. See `RewardModelLoss`.

    Raises:
        ValueError: anything that the user has to fix.
    """
    with open_world(config) as topology, open_run_folder(config, topology) as checkpoint:
        chunks, created, tokenizer = load_main_model(
            config, topology, role="reward", recompute_layers=config.train.recompute_layers
        )
        if created:
            log(f"{config.model.path} is a policy: the scalar head starts new", topology)
        records, held_out = open_pairs(
            config.data, config.run.output, tokenizer, chunks[0].glm, seed=config.run.seed, topology=topology
        )
        loss = RewardModelLoss(l2_coef=config.reward.l2_coef)

        def write_table(step: int, sums: Mapping[str, float]) -> None:
            folder = Path(config.run.output) / "calibration"
            with without_failing(folder):  # on the main rank alone
                write_calibration(folder, step, calibration_table(sums))

        held = held_out_of(config, held_out, loss, write_table)
        run_training(config, chunks, loss, records, held=held, topology=topology, checkpoint=checkpoint)
