"""Loading of a model from its folder, and initialisation of its weights from a folder or at random."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glm_rlhf.parallel.model.glm import GLMModel, Role, build_model
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.sharding import HfSlice, read_shard, shards_of
from glm_rlhf.parallel.spec.weight_map import SCALAR_ROLES, names_within, weights_of
from glm_rlhf.parallel.storage.checkpoint_manifest import is_checkpoint
from glm_rlhf.parallel.storage.checkpoint_tensors import open_checkpoint
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.hf_reader import iterate_shard, with_stored_score_bias


def load_model(
    folder: str | Path,
    topology: Topology,
    *,
    role: Role = "policy",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1234,
    recompute_layers: bool = False,
) -> tuple[list[GLMModel], tuple[str, ...]]:
    """Return this rank's chunks of the model in a Hugging Face folder, with its weights.

    Every rank of the topology calls this; an error on one is raised on all.

    Args:
        folder: Hugging Face folder.
        topology: layout and groups.
        role: which head the model ends in.
        dtype: of the weights; a scalar head is fp32.
        seed: of a scalar head that is missing in the folder.
        recompute_layers: keep only each layer's input for backward, and recompute the layer there.

    Returns:
        (chunks, names of weights that were initialised at random because the folder has none; equal on all
        ranks).

    Raises:
        ValueError: not a model folder, damaged, or the layout cannot split the model.
    """
    with raise_on_all_ranks(f"reading {folder}"):
        config = read_config(folder)
        if role in SCALAR_ROLES:
            config = with_stored_score_bias(config, Path(folder))
        topology.layout.check_model(config)
    if config.has_score_bias:
        log(f"{folder} holds a score.bias: it stays in every score, and is not trained", topology)
    chunks = build_model(config, topology, role=role, dtype=dtype, recompute_layers=recompute_layers)
    created = load_weights(chunks, folder, seed=seed)
    return chunks, created


@torch.no_grad()
def load_weights(chunks: Sequence[GLMModel], folder: str | Path, *, seed: int = 1234) -> tuple[str, ...]:
    """Fill this rank's chunks from a Hugging Face folder, reading only their slices.

    Every rank of the topology calls this; an error on one is raised on all.

    Args:
        chunks: result of `build_model`.
        folder: Hugging Face folder of the model's family, or a training checkpoint.
        seed: of a scalar head that is missing in the folder; every rank draws the same.

    Returns:
        Names of the weights that were initialised at random because the folder has none, on any stage: only a
        scalar head can be missing. A `chatglm` head without a bias is not reported: its bias is 0.

    Raises:
        ModelFolderError: the folder is damaged or of another model; a ValueError.
    """
    created: list[str] = []
    topology = chunks[0].topology
    with raise_on_all_ranks(f"loading {folder}"):
        if is_checkpoint(Path(folder)):
            open_checkpoint(folder).check_files(rank=topology.rank, world_size=topology.world_size)
        for chunk in chunks:
            parameters = dict(chunk.named_weights())
            topology = chunk.topology
            stream = iterate_shard(
                folder,
                chunk.glm,
                tp_rank=topology.tp_rank,
                tp_size=topology.layout.tp,
                dtype=chunk.config.params_dtype,
                **part_of(chunk),
            )
            stream.read_into(parameters)
            for shard in stream.shards:
                del parameters[shard.name]
            for name in stream.missing:
                _create_head(name, parameters.pop(name), seed)
            if "value_head.weight" in stream.missing:
                created += stream.missing
            assert not parameters, f"not filled: {sorted(parameters)}"
    return _on_any_stage(created, chunks[0].topology)


@torch.no_grad()
def randomize_weights(chunks: Sequence[GLMModel], *, seed: int) -> None:
    """Initialise this rank's chunks at random, with values that depend on the seed but not on the layout.

    Matrices are normal with the config's standard deviation, norms one, biases zero. No communication: each
    rank draws whole tensors, one at a time, and keeps its part.
    """
    for chunk in chunks:
        glm, topology = chunk.glm, chunk.topology
        parameters = dict(chunk.named_weights())
        for weight in weights_of(glm, **part_of(chunk)):
            for shard in shards_of(weight, glm, tp_rank=topology.tp_rank, tp_size=topology.layout.tp):
                parameter = parameters.pop(shard.name)
                if weight.section == "value_head":
                    _create_head(shard.name, parameter, seed)
                else:
                    draw = _drawing(names_within(weight, glm), glm.init_std, seed)
                    parameter.copy_(read_shard(shard, draw, dtype=torch.float32))
        assert not parameters, f"not filled: {sorted(parameters)}"


def _on_any_stage(names: list[str], topology: Topology) -> tuple[str, ...]:
    """Return the names of all pipeline stages, on every stage: the last has the head, the first reports."""
    lists: list[list[str]] = [[] for _ in range(topology.layout.pp)]
    dist.all_gather_object(lists, names, group=topology.pp_group)
    return tuple(name for part in lists for name in part)


def part_of(chunk: GLMModel) -> dict[str, Any]:
    """Return the part of the whole model that a chunk holds, as arguments of `weights_of`."""
    return {
        "layers": range(chunk.first_layer, chunk.first_layer + len(chunk.decoder.layers)),
        "has_embedding": chunk.pre_process,
        "has_head": chunk.post_process,
        "role": "policy" if chunk.role == "reference" else chunk.role,
    }


def _drawing(
    shapes: dict[str, tuple[int, ...]], std: float, seed: int
) -> Callable[[HfSlice, torch.Tensor], None]:
    """Return a function that fills a piece at random, with a separate generator per Hugging Face tensor."""

    def draw(piece: HfSlice, out: torch.Tensor) -> None:
        shape = shapes[piece.name]
        if len(shape) == 1:
            out.fill_(0.0 if piece.name.endswith("bias") else 1.0)
            return
        whole = torch.empty(shape).normal_(0.0, std, generator=_generator(piece.name, seed))
        out.copy_(whole.narrow(piece.dim, piece.start, piece.length))

    return draw


def _create_head(name: str, parameter: torch.Tensor, seed: int) -> None:
    """Initialise a scalar head with small values, so that first scores are near 0: normal, std 1/(D + 1)."""
    if name.endswith("bias"):
        parameter.zero_()
        return
    values = torch.empty(parameter.shape).normal_(
        0.0, 1.0 / (parameter.shape[-1] + 1), generator=_generator(name, seed)
    )
    parameter.copy_(values)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
