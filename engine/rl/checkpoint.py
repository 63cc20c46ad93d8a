"""All that a PPO run is, into a checkpoint and out of one."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.engine.runs.checkpoints import find_checkpoint, is_same_layout, open_writer, restore_run
from glm_rlhf.engine.runs.fingerprint import model_identity
from glm_rlhf.parallel.megatron_compat.rng_state import random_state
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_tensors import Checkpoint


def save_run(
    roles: PPORoles,
    config: PPOConfig,
    folder: Path,
    *,
    topology: Topology,
    progress: Mapping[str, Any] | None,
    keep_last: int,
) -> Path:
    """Write a checkpoint `step_N` into a folder, as `PPOEngine.save` says; every rank calls this."""
    step = roles.iteration
    with raise_on_all_ranks(f"fingerprinting the models of {config.model.path}"):
        identity = identity_of_models(config) if topology.is_main_rank else {}
    with open_writer(
        folder,
        config,
        roles.states,
        topology=topology,
        keep_last=keep_last or sys.maxsize,
        is_async=False,
    ) as writer:
        writer.save(
            step,
            roles.states,
            state={"identity": identity, "progress": roles.progress(), "caller": dict(progress or {})},
            rank_tensors=random_state() | roles.rewards.baseline_tensors(),
        )
    return folder / f"step_{step}"


def load_run(roles: PPORoles, config: PPOConfig, path: Path, *, topology: Topology) -> dict[str, Any]:
    """Bring the roles to a checkpoint, as `PPOEngine.load` says; every rank calls this."""
    checkpoint = find_checkpoint(path, topology)
    if checkpoint is None:
        raise ValueError(f"{path} is no checkpoint and holds none: give what PPOEngine.save was given")
    with raise_on_all_ranks(f"fingerprinting the models of {config.model.path}"):
        identity = identity_of_models(config) if topology.is_main_rank else {}
    progress = restore_run(checkpoint, roles.states, config=config, identity=identity, topology=topology)
    restore_roles(roles, checkpoint, progress)
    caller: dict[str, Any] = checkpoint.manifest.state.get("caller", {})
    return caller


def restore_roles(roles: PPORoles, checkpoint: Checkpoint, progress: Mapping[str, Any]) -> None:
    """Bring what the roles carry between iterations to a checkpoint; every rank calls this.

    Scores of reference answers are a data-parallel rank's own in the same layout; in another one every rank
    takes over those of all.
    """
    topology = roles.topology
    roles.set_progress(progress)
    with raise_on_all_ranks(f"resuming from {checkpoint.folder}"):
        ranks = (
            [topology.rank] if is_same_layout(checkpoint, topology) else range(checkpoint.manifest.world_size)
        )
        for rank in ranks:
            roles.rewards.add_baselines(checkpoint.rank_tensors(rank))


def identity_of_models(config: PPOConfig) -> dict[str, str]:
    """Return fingerprints of the models that a run starts from, by key."""
    reference = config.reference.path or config.model.path
    paths: dict[str, str | None] = {"model.path": config.model.path, "reference.path": reference}
    paths |= {"reward.path": config.reward.path, "critic.path": config.critic.path}
    return {key: model_identity(path) for key, path in paths.items() if path is not None}
