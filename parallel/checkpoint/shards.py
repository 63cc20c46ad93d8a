"""Which parts of a model in training a rank stores, and what the model is for the manifest."""

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
    """Yield (row of the table, parameter, first tensor-parallel rank with the same one) for this rank."""
    topology = training.topology
    tp = {"tp_rank": topology.tp_rank, "tp_size": topology.layout.tp}
    for chunk in training.bare_chunks:
        for weight in weights_of(chunk.glm, **part_of(chunk)):
            for shard in shards_of(weight, chunk.glm, **tp):
                yield weight, shard, owner_rank(weight, shard, chunk.glm, **tp)


def stored_tensors(
    model: str, training: AnyTrainingState
) -> tuple[dict[str, torch.Tensor | SplitMaster], dict[str, int]]:
    """Return the tensors that this rank stores of a model, and the first element of each parameter's part.

    Of equal parameters the first is stored: tensor-parallel ranks hold norms, and key/value heads that they
    share, alike; the last stage has a copy of a tied head; a frozen parameter is the same on all
    data-parallel ranks. Nothing is copied.
    """
    topology = training.topology
    stored = {
        shard.name
        for weight, shard, holder in held_shards(training)
        if holder == topology.tp_rank and not _is_tied_copy(weight, training)
    }
    tensors, starts = {}, {}
    for part in parts_of(training):
        if part.name in stored and (part.is_trained or topology.dp_cp_group.rank() == 0):
            starts[part.name] = part.start
            weight = part.weight if isinstance(part.weight, SplitMaster) else part.weight.detach()
            for kind, values in {WEIGHT: weight, **part.moments}.items():
                tensors[tensor_name(model, kind, part.name)] = values
    return tensors, starts


def facts_of(training: AnyTrainingState) -> ModelInfo:
    """Return what this rank knows of a model; `joined_facts` makes it whole."""
    chunk = training.bare_chunks[0]
    return ModelInfo(
        role=part_of(chunk)["role"],
        config=chunk.glm,
        dtype=DTYPE_NAMES[chunk.config.params_dtype],
        num_steps=num_steps_of(training),
        frozen=tuple(sorted(frozen_weights(training))),
        gradient_squares=gradient_squares_of(training),
    )


def joined_facts(facts: Sequence[ModelInfo]) -> ModelInfo:
    """Return the facts of a model from those of all ranks, some of which own nothing that is trained."""
    return replace(
        facts[0],
        num_steps=max(one.num_steps for one in facts),
        frozen=tuple(sorted({name for one in facts for name in one.frozen})),
        gradient_squares={name: square for one in facts for name, square in one.gradient_squares.items()},
    )


def frozen_weights(training: AnyTrainingState) -> set[str]:
    """Return our names of the weights on this rank that are not trained."""
    trained = {name: p.requires_grad for chunk in training.bare_chunks for name, p in chunk.named_weights()}
    return {
        weight.name
        for weight, shard, _ in held_shards(training)
        if not trained[shard.name] and not _is_tied_copy(weight, training)
    }


def _is_tied_copy(weight: Weight, training: AnyTrainingState) -> bool:
    return weight.name == "output_layer.weight" and training.bare_chunks[0].glm.has_tied_head
