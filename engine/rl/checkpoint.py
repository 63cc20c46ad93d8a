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
from glm_rlhf.parallel.runtime.consensus import agreed
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_tensors import Checkpoint


def save_run(
    roles: PPORoles,
    config: PPOConfig,
    folder: Path,
    *,
    place: Topology,
    progress: Mapping[str, Any] | None,
    keep_last: int,
) -> Path:
    """Write a checkpoint `step_N` into a folder, as `PPOEngine.save` says; every rank calls this."""
    step = roles.iteration
    with agreed(f"fingerprinting the models of {config.model.path}"):
        identity = identity_of_models(config) if place.is_reporter else {}
    with open_writer(
        folder,
        config,
        roles.trained,
        place=place,
        keep_last=keep_last or sys.maxsize,
        is_async=False,
    ) as writer:
        writer.save(
            step,
            roles.trained,
            state={"identity": identity, "progress": roles.progress(), "caller": dict(progress or {})},
            rank_tensors=random_state() | roles.rewards.baseline_tensors(),
        )
    return folder / f"step_{step}"


def load_run(roles: PPORoles, config: PPOConfig, path: Path, *, place: Topology) -> dict[str, Any]:
    """Bring the roles to a checkpoint, as `PPOEngine.load` says; every rank calls this."""
    origin = find_checkpoint(path, place)
    if origin is None:
        raise ValueError(f"{path} is no checkpoint and holds none: give what PPOEngine.save was given")
    with agreed(f"fingerprinting the models of {config.model.path}"):
        identity = identity_of_models(config) if place.is_reporter else {}
    progress = restore_run(origin, roles.trained, config=config, identity=identity, place=place)
    take_over(roles, origin, progress)
    return origin.manifest.state.get("caller", {})


def take_over(roles: PPORoles, origin: Checkpoint, progress: Mapping[str, Any]) -> None:
    """Bring what the roles carry between iterations to a checkpoint; every rank calls this.

    Scores of reference answers are a data-parallel rank's own in the same layout; in another one every rank
    takes over those of all.
    """
    place = roles.topology
    roles.set_progress(progress)
    with agreed(f"resuming from {origin.folder}"):
        ranks = [place.rank] if is_same_layout(origin, place) else range(origin.manifest.world_size)
        for rank in ranks:
            roles.rewards.add_baselines(origin.rank_tensors(rank))


def identity_of_models(config: PPOConfig) -> dict[str, str]:
    """Return fingerprints of the models that a run starts from, by key."""
    reference = config.reference.path or config.model.path
    paths = {"model.path": config.model.path, "reference.path": reference}
    paths |= {"reward.path": config.reward.path, "critic.path": config.critic.path}
    return {key: model_identity(path) for key, path in paths.items() if path is not None}
