"""Models beside a command's own, which have to read the ids that it draws or is given."""

from pathlib import Path

import torch

from glm_rlhf.parallel.glm import GLMModel, Role
from glm_rlhf.parallel.glm_config import GLMConfig
from glm_rlhf.parallel.load import load_model
from glm_rlhf.parallel.topology import Topology


def load_other(
    key: str,
    path: str | Path,
    place: Topology,
    *,
    role: Role,
    dtype: torch.dtype,
    beside: GLMConfig,
    seed: int = 1234,
    recompute_layers: bool = False,
) -> tuple[list[GLMModel], tuple[str, ...]]:
    """Return what `load_model` does of a model that another one's ids go through; every rank calls this.

    Args:
        key: of the config, that named the folder.
        path: the folder.
        place, role, dtype, seed, recompute_layers: as for `load_model`.
        beside: shape of the command's own model.

    Raises:
        ValueError: as `load_model`; or its vocabulary has another size, or it is to give rewards and the
            folder has no scalar head, whose place a new one would take.
    """
    chunks, created = load_model(
        path, place, role=role, dtype=dtype, seed=seed, recompute_layers=recompute_layers
    )
    glm = chunks[0].glm
    if role == "reward" and created:
        raise ValueError(
            f"{key} is {path}, which has no scalar head: give a reward model, as the command reward makes one"
        )
    if glm.vocab_size != beside.vocab_size:
        raise ValueError(
            f"{key} has {glm.vocab_size} rows in its vocabulary, model.path {beside.vocab_size}: they "
            "do not read the same ids"
        )
    return chunks, created
