"""The command `dpo`: a policy learns to prefer the chosen answer of a pair, KL-regularised to a reference."""

import time
from collections.abc import Sequence

from glm_rlhf.engine.build.models import DTYPES, load_main_model, load_other
from glm_rlhf.engine.build.records import open_pairs
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.config.training import DPOConfig
from glm_rlhf.engine.data.store.examples import Pairs
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.runs.run_folder import open_run_folder
from glm_rlhf.engine.scoring.pair_logprobs import score_reference
from glm_rlhf.engine.training.record_losses import DPOLoss
from glm_rlhf.engine.training.run import held_out_of, run_training, sampler_of
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology


def run(config: DPOConfig) -> None:
    """Train a policy on pairs; every rank of the launch calls it.

    The reference scores every pair that the run will see once, before the first step; then its weights are
    not needed any more. The run folder gets metrics, checkpoints to resume from, and Hugging Face folders.
    See `DPOLoss`.

    Raises:
        ValueError: anything that the user has to fix.
    """
    with open_world(config) as topology, open_run_folder(config, topology) as checkpoint:
        chunks, _, tokenizer = load_main_model(
            config, topology, recompute_layers=config.train.recompute_layers
        )
        records, held_out = open_pairs(
            config.data, config.run.output, tokenizer, chunks[0].glm, seed=config.run.seed, topology=topology
        )
        losses = _with_reference(config, chunks, tokenizer, records, held_out, topology)
        held = held_out_of(config, held_out, losses[-1])
        run_training(config, chunks, losses[0], records, held=held, topology=topology, checkpoint=checkpoint)


def _with_reference(
    config: DPOConfig,
    chunks: Sequence[GLMModel],
    tokenizer: Tokenizer | None,
    records: Pairs,
    held_out: Pairs | None,
    topology: Topology,
) -> list[DPOLoss]:
    """Return the loss on the records, and on those held out if there are any."""
    reference = chunks
    if config.reference.path is not None:
        dtype, glm = DTYPES[config.train.dtype], chunks[0].glm
        reference, _ = load_other(
            "reference.path",
            config.reference.path,
            topology,
            role="reference",
            dtype=dtype,
            beside=glm,
            tokenizer=tokenizer,
            tokenizer_path=config.tokenizer_path,
        )
    sampler, start = sampler_of(config, records), time.monotonic()
    seen = {number for step in range(config.train.steps) for number in sampler.batch(step)}
    wanted = [(records, sorted(seen))]
    if held_out is not None:
        wanted.append((held_out, list(range(min(len(held_out), config.data.eval_records)))))
    losses = []
    for pairs, numbers in wanted:
        scores = score_reference(
            reference,
            pairs,
            numbers,
            discount=config.dpo.token_discount,
            max_tokens=config.train.micro_batch_tokens,
            topology=topology,
        )
        losses.append(DPOLoss(scores, config.dpo))
    log(
        f"the reference scored {sum(len(numbers) for _, numbers in wanted)} pairs in "
        f"{time.monotonic() - start:.1f} s",
        topology,
    )
    return losses
