"""A model from its folder, ready on this rank: config, chunks, weights."""

from pathlib import Path

import torch

from glm_rlhf.parallel.agreement import agreed
from glm_rlhf.parallel.glm import GLMModel, Role, build_model
from glm_rlhf.parallel.hf_config import read_config
from glm_rlhf.parallel.topology import Topology
from glm_rlhf.parallel.weights import load_weights


def load_model(
    folder: str | Path,
    topology: Topology,
    *,
    role: Role = "policy",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1234,
    recompute_layers: bool = False,
) -> tuple[list[GLMModel], tuple[str, ...]]:
    """Return this rank's chunks of the model in a Hugging Face folder, weights in place.

    Every rank of the topology calls this; a fault on one is raised on all.

    Args:
        folder: Hugging Face folder.
        topology: layout and groups.
        role: which head the model ends in.
        dtype: of the weights; a scalar head is fp32.
        seed: of a scalar head that the folder does not hold.
        recompute_layers: keep only each layer's input for backward, and run the layer again there.

    Returns:
        (chunks, our names of weights that were created at random because the folder has none; the same on
        every rank).

    Raises:
        ValueError: not a model folder, damaged, or not to be split in this layout.
    """
    with agreed(f"reading {folder}"):
        config = read_config(folder)
        topology.layout.check_model(config)
    chunks = build_model(config, topology, role=role, dtype=dtype, recompute_layers=recompute_layers)
    created = load_weights(chunks, folder, seed=seed)
    return chunks, created
