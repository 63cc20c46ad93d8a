"""A training command from its run folder to its last checkpoint."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path

from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.training import DPOConfig, OptimizerSection, RewardConfig, SFTConfig, TrainSection
from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.data.store.examples import Records
from glm_rlhf.engine.health.watchdog import watchdog
from glm_rlhf.engine.observe.metrics import open_metrics
from glm_rlhf.engine.observe.report import tell_report
from glm_rlhf.engine.runs.checkpoints import EXPORTS, open_checkpoints, resume
from glm_rlhf.engine.runs.fingerprint import lengths_identity, model_identity
from glm_rlhf.engine.training.loop import HeldOut, LoopProgress, LoopResult, LoopSettings, train
from glm_rlhf.engine.training.lr_schedule import cosine_lr
from glm_rlhf.engine.training.step import Objective
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.preemption import Preempted, handle_preemption_signals
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
    objective: Objective,
    on_result: Callable[[int, Mapping[str, float]], None] | None = None,
) -> HeldOut | None:
    """Return what a run is evaluated on: the first `data.eval_records` of its held-out records, if any."""
    if records is None:
        return None
    numbers = range(min(len(records), config.data.eval_records))
    return HeldOut(records=records, objective=objective, numbers=numbers, on_result=on_result)


def run_training(
    config: TrainingConfig,
    chunks: Sequence[GLMModel],
    objective: Objective,
    records: Records,
    *,
    held: HeldOut | None,
    topology: Topology,
    checkpoint: Checkpoint | None,
) -> None:
    """Train `chunks` as the config says; every rank calls this, rank 0 tells how it went.

    With an `origin` the run goes on from it: the next step is the one that would have followed.

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

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            open_checkpoints(
                config,
                {"policy": state},
                identity=_identity(config, records, topology),
                export=lambda folder: export_model(
                    chunks, folder, topology=topology, source=config.model.path
                ),
                topology=topology,
            )
        )
        progress = LoopProgress()
        if checkpoint is not None:
            progress = LoopProgress(**resume(checkpoint, checkpoints))
            if progress.step >= config.train.steps:
                checkpoints.close_finished(progress.step)
                return
        with raise_on_all_ranks(f"writing to {config.run.output}"):
            write = stack.enter_context(
                open_metrics(
                    config.run.output,
                    is_owner=topology.is_main_rank,
                    uses_tensorboard=config.observe.tensorboard,
                    wandb_project=config.observe.wandb,
                    run_name=config.run.name,
                    config=dataclasses.asdict(config),
                    last_step=None if checkpoint is None else progress.step,
                )
            )
        stack.enter_context(watchdog(config.run.watchdog_s, rank=topology.rank))
        stack.enter_context(handle_preemption_signals())
        try:
            result = train(
                state,
                objective,
                records,
                sampler,
                _loop_settings(config.train, config.optimizer),
                topology=topology,
                write=write,
                checkpoints=checkpoints,
                held=held,
                progress=progress,
            )
        except Preempted:
            return
    if topology.is_main_rank:
        tell_report(config.run.output, title=config.run.name)
        sys.stderr.write(_in_words(config, result))


def _identity(config: TrainingConfig, records: Records, topology: Topology) -> dict[str, str]:
    """Return fingerprints of what a run learns from, on the reporter; elsewhere nothing."""
    if not topology.is_main_rank:
        return {}
    identity = {
        "model.path": model_identity(config.model.path),
        "data.path": lengths_identity(records.lengths),
    }
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


def _loop_settings(settings: TrainSection, optimizer: OptimizerSection) -> LoopSettings:
    return LoopSettings(
        steps=settings.steps,
        micro_batch_tokens=settings.micro_batch_tokens,
        lr_of=partial(
            cosine_lr,
            steps=settings.steps,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            warmup_steps=optimizer.warmup_steps,
        ),
        eval_every=settings.eval_every,
        max_nonfinite_steps=settings.max_nonfinite_steps,
    )


def _in_words(config: TrainingConfig, result: LoopResult) -> str:
    steps = config.train.steps
    skipped = f", {result.num_skipped} of them not taken" if result.num_skipped else ""
    loss = "" if math.isnan(result.first_loss) else f": loss {result.first_loss:.4f} → {result.last_loss:.4f}"
    return (
        f"trained {steps} steps{skipped} in {result.elapsed_s:.1f} s{loss}, "
        f"{result.num_tokens / result.elapsed_s:.0f} tokens/s; written to "
        f"{Path(config.run.output) / EXPORTS / f'step_{steps}'}\n"
    )
