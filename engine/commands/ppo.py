"""The command `ppo`: a policy learns from rewards, generating and training on the same ranks and weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from glm_rlhf.engine.build.prompts import read_prompt_inputs
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.data.records.reading import ReadReport
from glm_rlhf.engine.rl.checkpoint import identity_of_models, restore_roles
from glm_rlhf.engine.rl.engine import PPOEngine
from glm_rlhf.engine.rl.evaluation import prompts_identity
from glm_rlhf.engine.rl.loop import run_iterations
from glm_rlhf.engine.rl.partial_update import update_of
from glm_rlhf.engine.runs.checkpoints import IS_INSIDE, is_same_layout
from glm_rlhf.engine.runs.context import open_run
from glm_rlhf.engine.runs.fingerprint import data_identity
from glm_rlhf.engine.runs.run_folder import open_run_folder
from glm_rlhf.engine.training.run import sampler_of
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.storage.checkpoint_tensors import Checkpoint


def run(config: PPOConfig) -> None:
    """Train a policy by PPO; every rank of the launch calls it.

    The run folder gets metrics, sample answers, a report, checkpoints to resume from, and the policy as
    Hugging Face folders.

    Raises:
        ValueError: anything that the user has to fix.
    """
    with PPOEngine(config, before_models=partial(open_run_folder, config)) as engine:
        checkpoint: Checkpoint | None = engine.entered
        topology = engine.topology
        prompts = _read_prompts(engine)
        with raise_on_all_ranks("reading the prompts"):
            sampler = sampler_of(config, prompts)
        with open_run(
            config,
            engine.roles.states,
            identity=_identity(engine, prompts),
            export=engine.export_hf,
            checkpoint=checkpoint,
            topology=topology,
        ) as run:
            if checkpoint is not None:
                _resume(engine, checkpoint, run.progress)
            if run.is_finished:
                return
            run_iterations(engine, run, prompts, sampler)


def _read_prompts(engine: PPOEngine) -> list[PromptInput]:
    """Return the prompts to learn from, on every rank."""
    config, report = engine.config, ReadReport()
    with raise_on_all_ranks("reading the prompts"):
        prompts = read_prompt_inputs(
            config.data.path,
            engine.tokenizer,
            engine.model_config,
            max_prompt_tokens=config.data.max_prompt_tokens,
            on_error=config.data.on_error,
            report=report,
        )
    if report.num_skipped:
        log(f"{report.num_skipped} bad prompts skipped, {len(prompts)} left", engine.topology)
    return prompts


def _resume(engine: PPOEngine, checkpoint: Checkpoint, progress: Mapping[str, Any]) -> None:
    """Bring the roles to a checkpoint; models, optimizers and random generators are there already."""
    restore_roles(engine.roles, checkpoint, progress)
    if progress.get(IS_INSIDE):
        topology = engine.topology
        with raise_on_all_ranks(f"resuming from {checkpoint.folder}"):
            if not is_same_layout(checkpoint, topology):
                raise ValueError(
                    f"{checkpoint.folder} was left inside iteration {progress['step'] + 1}, and holds its "
                    "answers as its own layout deals them: resume in that one "
                    f"({checkpoint.manifest.layout}, {checkpoint.manifest.world_size} ranks), or remove it "
                    "and resume from the one before it"
                )
            engine.roles.partial_update = update_of(
                checkpoint.rank_tensors(topology.rank), device=topology.device
            )


def _identity(engine: PPOEngine, prompts: Sequence[PromptInput]) -> dict[str, str]:
    """Return fingerprints of the models that a run starts from and of its data, on the main rank only."""
    if not engine.topology.is_main_rank:
        return {}
    identity = identity_of_models(engine.config)
    lengths = np.array([len(prompt.tokens) for prompt in prompts])
    identity |= data_identity("data.path", lengths=lengths, content=prompts_identity(prompts))
    if engine.roles.demonstrations is not None:
        records = engine.roles.demonstrations.records
        identity |= data_identity("data.sft_path", lengths=records.lengths, content=records.digest)
    return identity
