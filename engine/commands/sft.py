"""The command `sft`: a policy learns to give the answers of demonstrations."""

from glm_rlhf.engine.build.models import DTYPES, find_tokenizer, layout_of
from glm_rlhf.engine.build.records import open_demonstrations
from glm_rlhf.engine.config.training import SFTConfig
from glm_rlhf.engine.runs.checkpoints import open_run_folder
from glm_rlhf.engine.training.answer_likelihood import AnswerLikelihood
from glm_rlhf.engine.training.run import held_out_of, run_training
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.weights.load import load_model


def run(config: SFTConfig) -> None:
    """Train a policy on demonstrations; every rank of the launch calls it.

    The run folder gets metrics, checkpoints to go on from, and Hugging Face folders. See `AnswerLikelihood`
    for the loss.

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
        records, held_out = open_demonstrations(
            config.data, config.run.output, tokenizer, chunks[0].glm, topology=topology
        )
        run_training(
            config,
            chunks,
            AnswerLikelihood(records),
            records,
            held=held_out_of(config, held_out, AnswerLikelihood(held_out)) if held_out is not None else None,
            topology=topology,
            checkpoint=checkpoint,
        )
