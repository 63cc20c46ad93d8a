"""The table of weight names per family, read both ways.

A row gives a weight's Megatron-core name, its names in the family's Hugging Face folder, its shape there, and
how tensor parallelism splits it. Import and export read the same rows; conversion between families joins two
tables on the Megatron-core names.

Hugging Face conventions that are not obvious:
  - `chatglm` stores query, key and value in one tensor: all queries, then all keys, then all values; without
    `multi_query_attention` query, key and value of the first head, then those of the second, and so on.
    `glm` and `glm4` store three tensors.
  - The gated MLP's first matrix is [gate rows; up rows] in every family.
  - A critic or reward model ends in a scalar head. In `chatglm` it is `classifier_head`, [1, D] and a bias
    [1], as in the remote code's class. In `glm` and `glm4` it is `score`, [1, D], as in transformers'
    `…ForSequenceClassification`, which has no bias. A folder that holds a `score.bias` all the same keeps it
    as a constant, which transformers ignores: there every score is less by that amount.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from glm_rlhf.parallel.spec.model_config import Family, GLMConfig

Role = Literal["policy", "critic", "reward"]
SCALAR_ROLES = ("critic", "reward")
SCALAR_BIAS = "value_head.bias"
"""Our name of the scalar head's bias."""
Split = Literal["replicated", "rows", "columns", "qkv", "gate_up"]
Section = Literal["embedding", "layer", "final_norm", "vocabulary_head", "value_head"]


_LayerRow = tuple[str, str | tuple[str, ...], tuple[str, ...], Split]
"""A weight of one layer: our name, theirs, the dimensions, the split."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One row of the table; `{i}` in names stands for the layer's index in the whole model."""

    name: str
    """Megatron-core name. A `qkv` weight becomes two modules where tp exceeds the number of KV heads."""
    hf_names: tuple[str, ...]
    """Hugging Face names: one tensor, or separate query, key and value."""
    shape: tuple[str, ...]
    """Dimensions of the whole weight, as keys of `sizes`."""
    split: Split
    """How tensor-parallel ranks split it."""
    section: Section
    """The part of the model that holds it."""


def _table(
    *,
    embedding: str,
    layer: str,
    final_norm: str,
    head: str,
    value_head: str,
    within_layer: tuple[_LayerRow, ...],
) -> tuple[Weight, ...]:
    rows = [Weight("embedding.word_embeddings.weight", (embedding,), ("V", "D"), "rows", "embedding")]
    for name, hf_names, shape, split in within_layer:
        hf_names = (hf_names,) if isinstance(hf_names, str) else hf_names
        rows.append(
            Weight(
                f"decoder.layers.{{i}}.{name}", tuple(layer + hf for hf in hf_names), shape, split, "layer"
            )
        )
    rows.append(Weight("decoder.final_layernorm.weight", (final_norm,), ("D",), "replicated", "final_norm"))
    rows.append(Weight("output_layer.weight", (head,), ("V", "D"), "rows", "vocabulary_head"))
    rows.append(
        Weight("value_head.weight", (f"{value_head}.weight",), ("1", "D"), "replicated", "value_head")
    )
    rows.append(Weight(SCALAR_BIAS, (f"{value_head}.bias",), ("1",), "replicated", "value_head"))
    return tuple(rows)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_GLM_LAYER: tuple[_LayerRow, ...] = (
    ("input_layernorm.weight", "input_layernorm.weight", ("D",), "replicated"),
    ("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), ("QKV", "D"), "qkv"),
    ("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV), ("QKV",), "qkv"),
    ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("D", "Q"), "columns"),
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", ("D",), "replicated"),
    ("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", ("2F", "D"), "gate_up"),
    ("mlp.linear_fc2.weight", "mlp.down_proj.weight", ("D", "F"), "columns"),
)
_SANDWICH_NORMS: tuple[_LayerRow, ...] = (
    ("self_attn_bda.norm.weight", "post_self_attn_layernorm.weight", ("D",), "replicated"),
    ("mlp_bda.norm.weight", "post_mlp_layernorm.weight", ("D",), "replicated"),
)
_CHATGLM_LAYER: tuple[_LayerRow, ...] = (
    ("input_layernorm.weight", "input_layernorm.weight", ("D",), "replicated"),
    ("self_attention.linear_qkv.weight", "self_attention.query_key_value.weight", ("QKV", "D"), "qkv"),
    ("self_attention.linear_qkv.bias", "self_attention.query_key_value.bias", ("QKV",), "qkv"),
    ("self_attention.linear_proj.weight", "self_attention.dense.weight", ("D", "Q"), "columns"),
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", ("D",), "replicated"),
    ("mlp.linear_fc1.weight", "mlp.dense_h_to_4h.weight", ("2F", "D"), "gate_up"),
    ("mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", ("D", "F"), "columns"),
)
_HUGGING_FACE = {
    "embedding": "model.embed_tokens.weight",
    "layer": "model.layers.{i}.",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "value_head": "score",
}

TABLES: dict[Family, tuple[Weight, ...]] = {
    "chatglm": _table(
        embedding="transformer.embedding.word_embeddings.weight",
        layer="transformer.encoder.layers.{i}.",
        final_norm="transformer.encoder.final_layernorm.weight",
        head="transformer.output_layer.weight",
        value_head="classifier_head",
        within_layer=_CHATGLM_LAYER,
    ),
    "glm": _table(**_HUGGING_FACE, within_layer=_GLM_LAYER),
    "glm4": _table(**_HUGGING_FACE, within_layer=_GLM_LAYER + _SANDWICH_NORMS),
}

NOT_WEIGHTS: dict[Family, re.Pattern[str]] = {
    "chatglm": re.compile(r"transformer\.rotary_pos_emb\.inv_freq"),
    "glm": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    "glm4": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
}
"""Tensors that the config determines. Import skips them. An export to the same family as its source copies
ChatGLM's, since the remote code registers it as part of the model; no other export writes them."""


def sizes(config: GLMConfig) -> dict[str, int]:
    """Return the size in elements of every dimension that the tables name."""
    query, key_value = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return {
        "1": 1,
        "V": config.vocab_size,
        "D": config.hidden_size,
        "Q": query,
        "KV": key_value,
        "QKV": query + 2 * key_value,
        "F": config.ffn_size,
        "2F": 2 * config.ffn_size,
    }


def weights_of(
    config: GLMConfig,
    *,
    layers: Iterable[int],
    has_embedding: bool = True,
    has_head: bool = True,
    role: Role = "policy",
) -> list[Weight]:
    """Return the rows, layer indices filled in, of the part of a model that one pipeline stage holds.

    A tied head uses the embedding's weight. A stage that holds the head and not the embedding needs a copy:
    there `output_layer.weight` is a row that reads the embedding.

    Args:
        config: the whole model.
        layers: indices in the whole model, in any order.
        has_embedding: whether the stage embeds tokens.
        has_head: whether the stage has the final norm and the role's head.
        role: `policy` ends in the vocabulary head, `critic` and `reward` in the value head.

    Raises:
        ValueError: the role is unknown, a layer is outside the model, or the config's norms are not those of
            its family.
    """
    if role not in ("policy", "critic", "reward"):
        raise ValueError(f"role is {role!r}; it must be policy, critic or reward")
    if config.has_sandwich_norms != (config.family == "glm4"):
        raise ValueError(
            f"has_sandwich_norms is {config.has_sandwich_norms} for the family {config.family}; "
            "glm4 has them, chatglm and glm do not"
        )
    rows = TABLES[config.family]
    chosen = [row for row in rows if row.section == "embedding" and has_embedding]
    for index in layers:
        if not 0 <= index < config.num_layers:
            raise ValueError(f"layer {index} is not one of the model's {config.num_layers} layers")
        chosen += [_at_layer(row, index) for row in rows if _is_in_layer(row, config)]
    if has_head:
        chosen += [row for row in rows if row.section == "final_norm"]
        chosen += _head_of(config, role, has_embedding)
    return chosen


def has_scalar_bias(config: GLMConfig) -> bool:
    """Return whether the scalar head of such a critic or reward model adds a bias."""
    return trains_scalar_bias(config) or config.has_score_bias


def trains_scalar_bias(config: GLMConfig) -> bool:
    """Return whether the bias of the scalar head is trained, as the family's own class has it."""
    return config.family == "chatglm"


def names_within(weight: Weight, config: GLMConfig) -> dict[str, tuple[int, ...]]:
    """Return the Hugging Face tensors that make up a weight, each with its required shape."""
    size = sizes(config)
    shape = tuple(size[letter] for letter in weight.shape)
    if len(weight.hf_names) == 1:
        return {weight.hf_names[0]: shape}
    rows = (size["Q"], size["KV"], size["KV"])
    return {name: (num_rows, *shape[1:]) for name, num_rows in zip(weight.hf_names, rows, strict=True)}


def _is_in_layer(row: Weight, config: GLMConfig) -> bool:
    return row.section == "layer" and (config.has_qkv_bias or not row.name.endswith("linear_qkv.bias"))


def _at_layer(row: Weight, index: int) -> Weight:
    hf_names = tuple(name.format(i=index) for name in row.hf_names)
    return Weight(row.name.format(i=index), hf_names, row.shape, row.split, row.section)


def _head_of(config: GLMConfig, role: Role, has_embedding: bool) -> list[Weight]:
    rows = TABLES[config.family]
    section = "vocabulary_head" if role == "policy" else "value_head"
    heads = [row for row in rows if row.section == section]
    if not has_scalar_bias(config):
        heads = [row for row in heads if row.name != SCALAR_BIAS]
    if role != "policy" or not config.has_tied_head:
        return heads
    if has_embedding:
        return []
    embedding = next(row for row in rows if row.section == "embedding")
    return [Weight(row.name, embedding.hf_names, row.shape, row.split, row.section) for row in heads]
