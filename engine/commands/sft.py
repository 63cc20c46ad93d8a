"""The command `sft`: a policy learns to give the answers of demonstrations."""

from glm_rlhf.engine.build.models import load_main_model
from glm_rlhf.engine.build.records import open_demonstrations
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.config.training import SFTConfig
from glm_rlhf.engine.runs.run_folder import open_run_folder
from glm_rlhf.engine.training.record_losses import SFTLoss
from glm_rlhf.engine.training.run import held_out_of, run_training


def run(config: SFTConfig) -> None:
    """Train a policy on demonstrations; every rank of the launch calls it.

    The run folder gets metrics, checkpoints to resume from, and Hugging Face folders. See `SFTLoss`.

    Raises:
        ValueError: anything that the user has to fix.
    """
    with open_world(config) as topology, open_run_folder(config, topology) as checkpoint:
        chunks, _, tokenizer = load_main_model(
            config, topology, recompute_layers=config.train.recompute_layers
        )
        records, held_out = open_demonstrations(
            config.data, config.run.output, tokenizer, chunks[0].glm, topology=topology
        )
        run_training(
            config,
            chunks,
            SFTLoss(records),
            records,
            held=None if held_out is None else held_out_of(config, held_out, SFTLoss(held_out)),
            topology=topology,
            checkpoint=checkpoint,
        )
