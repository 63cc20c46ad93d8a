"""A command that trains on records of a file, from its models to its last checkpoint."""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path

from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.training import DPOConfig, OptimizerSection, RewardConfig, SFTConfig
from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.data.store.examples import Records
from glm_rlhf.engine.runs.context import open_run
from glm_rlhf.engine.runs.exports import EXPORTS
from glm_rlhf.engine.runs.fingerprint import data_identity, model_identity
from glm_rlhf.engine.training.loop import HeldOut, LoopResult, train
from glm_rlhf.engine.training.loss import RecordLoss
from glm_rlhf.engine.training.lr_schedule import cosine_lr
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_tensors import Checkpoint
from glm_rlhf.parallel.weights.export import export_model

TrainingConfig = SFTConfig | RewardConfig | DPOConfig


def sampler_of(config: TrainingConfig | PPOConfig, records: Sized) -> BatchSampler:
    """Return what decides which records of `data.path` each step of a run takes.

    Raises:
        ValueError: fewer records than a batch.
    """
    if len(records) < config.train.global_batch_size:
        raise ValueError(
            f"{config.data.path} gives {len(records)} records, train.global_batch_size is "
            f"{config.train.global_batch_size}: lower it to {len(records)} or less, or give more records"
        )
    return BatchSampler(len(records), config.train.global_batch_size, seed=config.run.seed)


def held_out_of(
    config: TrainingConfig,
    records: Records | None,
    loss: RecordLoss,
    on_result: Callable[[int, Mapping[str, float]], None] | None = None,
) -> HeldOut | None:
    """Return what a run is evaluated on: the first `data.eval_records` of its held-out records, if any."""
    if records is None:
        return None
    numbers = range(min(len(records), config.data.eval_records))
    return HeldOut(records=records, loss=loss, numbers=numbers, on_result=on_result)


def run_training(
    config: TrainingConfig,
    chunks: Sequence[GLMModel],
    loss: RecordLoss,
    records: Records,
    *,
    held: HeldOut | None,
    topology: Topology,
    checkpoint: Checkpoint | None,
) -> None:
    """Train `chunks` as the config says; every rank calls this, the main rank reports the result.

    With a `checkpoint` the run resumes from it: the next step is the one that would have followed.

    Raises:
        ValueError: too few records, a run that stopped because its numbers were not finite, or a checkpoint
            that could not be written.
    """
    sampler = sampler_of(config, records)
    state = training_state(
        chunks,
        adam_of(config.optimizer),
        topology=topology,
        overlap_communication=config.train.overlap_communication,
        in_backward=config.optimizer.in_backward,
    )
    result = None
    with open_run(
        config,
        {"policy": state},  # its name in checkpoints, whatever its role
        identity=_identity(config, records, topology),
        export=lambda folder: export_model(chunks, folder, topology=topology, source=config.model.path),
        checkpoint=checkpoint,
        topology=topology,
    ) as run:
        if run.is_finished:
            return
        result = train(run, state, loss, records, sampler, lr_of=lr_schedule_of(config), held=held)
    if result is not None and topology.is_main_rank:
        log(_summary(config, result))


def _identity(config: TrainingConfig, records: Records, topology: Topology) -> dict[str, str]:
    """Return fingerprints of what a run learns from, on the main rank; elsewhere nothing."""
    if not topology.is_main_rank:
        return {}
    identity = {"model.path": model_identity(config.model.path)}
    identity |= data_identity("data.path", lengths=records.lengths, content=records.digest)
    if isinstance(config, DPOConfig):
        identity["reference.path"] = model_identity(config.reference.path or config.model.path)
    return identity


def adam_of(optimizer: OptimizerSection) -> AdamSettings:
    """Return the settings of an optimizer as the training state wants them."""
    return AdamSettings(
        lr=optimizer.lr,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
    )


def lr_schedule_of(config: TrainingConfig | PPOConfig) -> Callable[[int], float]:
    """Return the learning rate of a step, from 0, as a config has it."""
    optimizer = config.optimizer
    return partial(
        cosine_lr,
        steps=config.train.steps,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_steps=optimizer.warmup_steps,
    )


def _summary(config: TrainingConfig, result: LoopResult) -> str:
    steps = config.train.steps
    skipped = f", {result.num_skipped} of them not taken" if result.num_skipped else ""
    loss = "" if math.isnan(result.first_loss) else f": loss {result.first_loss:.4f} → {result.last_loss:.4f}"
    return (
        f"trained {steps} steps{skipped} in {result.elapsed_s:.1f} s{loss}, "
        f"{result.num_tokens / result.elapsed_s:.0f} tokens/s; written to "
        f"{Path(config.run.output) / EXPORTS / f'step_{steps}'}"
    )
