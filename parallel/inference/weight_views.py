"""The parameters that generation reads: of a training module, or of the generation layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """The parameters of one layer, not copied: an optimizer step changes them in place."""

    input_norm: torch.Tensor
    projections: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    """(weight, bias) of the joint query-key-value projection, or of separate query and key-value ones."""
    output: torch.Tensor
    attention_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    branch_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWeights:
    """The parameters of one model chunk of a policy on one rank."""

    glm: GLMConfig
    """Shape of the whole model."""
    topology: Topology
    """The layout that the parameters are split for, and its groups."""
    layers: tuple[LayerWeights, ...]
    """Of consecutive layers."""
    embedding_VD: torch.Tensor | None
    """This rank's rows; None except on the first chunk."""
    final_norm_D: torch.Tensor | None
    """None except on the last chunk."""
    head_VD: torch.Tensor | None
    """This rank's rows, the embedding's if the two are tied; None except on the last chunk."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every parameter."""
        return self.layers[0].output.dtype

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads on this rank: K / tp, or one replicated head."""
        return max(1, self.glm.num_kv_heads // self.topology.layout.tp)


def chunk_weights(chunks: Sequence[GLMModel | ChunkWeights]) -> list[ChunkWeights]:
    """Return the parameters of each of a rank's chunks; nothing is copied."""
    return [
        chunk
        if isinstance(chunk, ChunkWeights)
        else weights_by_name(
            dict(chunk.named_weights()),
            chunk.glm,
            chunk.topology,
            layers=range(chunk.first_layer, chunk.first_layer + len(chunk.decoder.layers)),
        )
        for chunk in chunks
    ]


def weights_by_name(
    named: Mapping[str, torch.Tensor], glm: GLMConfig, topology: Topology, *, layers: range
) -> ChunkWeights:
    """Return a chunk's parameters from a mapping of names to tensors.

    Args:
        named: names in the whole model (`weight_map.weights_of`, `sharding.shards_of`) to a rank's tensors.
        glm: the model.
        topology: of the tensors.
        layers: indices in the whole model of the chunk's layers.
    """
    has_embedding, has_head = layers.start == 0, layers.stop == glm.num_layers
    embedding = named.get("embedding.word_embeddings.weight")
    return ChunkWeights(
        glm=glm,
        topology=topology,
        layers=tuple(_layer(named, f"decoder.layers.{index}.") for index in layers),
        embedding_VD=embedding if has_embedding else None,
        final_norm_D=named["decoder.final_layernorm.weight"] if has_head else None,
        head_VD=named.get("output_layer.weight", embedding) if has_head else None,
    )


def _layer(named: Mapping[str, torch.Tensor], prefix: str) -> LayerWeights:
    def weight(name: str) -> torch.Tensor:
        return named[f"{prefix}{name}.weight"]

    joint = f"{prefix}self_attention.linear_qkv.weight" in named
    projections = ("linear_qkv",) if joint else ("linear_q", "linear_kv")
    return LayerWeights(
        input_norm=weight("input_layernorm"),
        projections=tuple(
            (weight(f"self_attention.{name}"), named.get(f"{prefix}self_attention.{name}.bias"))
            for name in projections
        ),
        output=weight("self_attention.linear_proj"),
        attention_norm=named.get(f"{prefix}self_attn_bda.norm.weight"),
        mlp_norm=weight("pre_mlp_layernorm"),
        gate_up=weight("mlp.linear_fc1"),
        down=weight("mlp.linear_fc2"),
        branch_norm=named.get(f"{prefix}mlp_bda.norm.weight"),
    )
