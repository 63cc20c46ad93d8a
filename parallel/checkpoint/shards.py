"""The shards of a model in training that a rank stores, and the model's entry in the manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.optim.state_access import gradient_squares_of, num_steps_of, parts_of
from glm_rlhf.parallel.optim.state_shard import SplitMaster
from glm_rlhf.parallel.spec.sharding import ParamShard, owner_rank, shards_of
from glm_rlhf.parallel.spec.weight_map import Weight, weights_of
from glm_rlhf.parallel.storage.checkpoint_manifest import WEIGHT, ModelInfo
from glm_rlhf.parallel.storage.checkpoint_tensors import tensor_name
from glm_rlhf.parallel.storage.safetensors_format import DTYPE_NAMES
from glm_rlhf.parallel.weights.load import part_of


def held_shards(training: AnyTrainingState) -> Iterator[tuple[Weight, ParamShard, int]]:
    """Yield (row of the table, shard, lowest tensor-parallel rank with an equal one) for this rank."""
    topology = training.topology
    tp = {"tp_rank": topology.tp_rank, "tp_size": topology.layout.tp}
    for chunk in training.bare_chunks:
        for weight in weights_of(chunk.glm, **part_of(chunk)):
            for shard in shards_of(weight, chunk.glm, **tp):
                yield weight, shard, owner_rank(weight, shard, chunk.glm, **tp)


def stored_tensors(
    model: str, training: AnyTrainingState
) -> tuple[dict[str, torch.Tensor | SplitMaster], dict[str, int]]:
    """Return the tensors that this rank stores of a model, and the first element of each shard.

    Of replicated parameters the first copy is stored: norms and shared key/value heads are equal on
    tensor-parallel ranks, the last stage has a copy of a tied head, and frozen parameters are equal on all
    data-parallel ranks. No tensor is copied.
    """
    topology = training.topology
    stored = {
        shard.name
        for weight, shard, owner in held_shards(training)
        if owner == topology.tp_rank and not _is_tied_copy(weight, training)
    }
    tensors, starts = {}, {}
    for part in parts_of(training):
        if part.name in stored and (part.is_trained or topology.dp_cp_group.rank() == 0):
            starts[part.name] = part.start
            weight = part.weight if isinstance(part.weight, SplitMaster) else part.weight.detach()
            for kind, values in {WEIGHT: weight, **part.moments}.items():
                tensors[tensor_name(model, kind, part.name)] = values
    return tensors, starts


def model_info(training: AnyTrainingState) -> ModelInfo:
    """Return this rank's part of a model's manifest entry; `joined_info` joins those of all ranks."""
    chunk = training.bare_chunks[0]
    return ModelInfo(
        role=part_of(chunk)["role"],
        config=chunk.glm,
        dtype=DTYPE_NAMES[chunk.config.params_dtype],
        num_steps=num_steps_of(training),
        frozen=tuple(sorted(frozen_weights(training))),
        gradient_squares=gradient_squares_of(training),
    )


def joined_info(per_rank: Sequence[ModelInfo]) -> ModelInfo:
    """Return a model's manifest entry from those of all ranks, some of which own no trained parameter."""
    return replace(
        per_rank[0],
        num_steps=max(info.num_steps for info in per_rank),
        frozen=tuple(sorted({name for info in per_rank for name in info.frozen})),
        gradient_squares={
            name: square for info in per_rank for name, square in info.gradient_squares.items()
        },
    )


def frozen_weights(training: AnyTrainingState) -> set[str]:
    """Return the names of this rank's frozen weights."""
    trained = {name: p.requires_grad for chunk in training.bare_chunks for name, p in chunk.named_weights()}
    return {
        weight.name
        for weight, shard, _ in held_shards(training)
        if not trained[shard.name] and not _is_tied_copy(weight, training)
    }


def _is_tied_copy(weight: Weight, training: AnyTrainingState) -> bool:
    return weight.name == "output_layer.weight" and training.bare_chunks[0].glm.has_tied_head
