"""Conversion between a Hugging Face `config.json` and `GLMConfig`.

Differences of rotary positions:
  - `glm` and `glm4` give the base itself, at the top level (transformers 4) or under `rope_parameters`
    (transformers 5). Both are read, and both are written: a reader that knows only one of them would
    silently use its default.
  - `chatglm` gives `rope_ratio`, and the base is 10000 · rope_ratio (ChatGLM3, GLM-4).
  - ChatGLM2-6B-32K divides positions by the same key. Such a folder is refused; it is recognised by its name
    in `_name_or_path`, or by that division in its modelling code, which is searched as text and never
    executed. Otherwise the ratio scales the base. At ratio 1 both are the same.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from glm_rlhf.parallel.spec.model_config import Family, GLMConfig
from glm_rlhf.parallel.storage.durable_io import replace_text
from glm_rlhf.parallel.storage.model_folder import ModelFolderError, open_folder, plain_file
from glm_rlhf.parallel.storage.text_files import read_json

_ROPE_BASE = 10000.0

_KEYS: dict[Family, dict[str, str]] = {
    "chatglm": {
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "multi_query_group_num",
        "head_size": "kv_channels",
        "ffn_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "max_positions": "seq_length",
        "norm_epsilon": "layernorm_epsilon",
        "has_qkv_bias": "add_qkv_bias",
    },
    "glm": {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "ffn_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "has_qkv_bias": "attention_bias",
    },
}
_KEYS["glm4"] = _KEYS["glm"]

_LARGEST = {"num_layers": 1024}
_LARGEST_SIZE = 2**24
"""Bounds on counts, far above any model, so that a damaged number is refused."""

_FIXED: dict[Family, dict[str, object]] = {
    "chatglm": {
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "tie_word_embeddings": False,
    },
    "glm": {"hidden_act": "silu"},
    "glm4": {"hidden_act": "silu"},
}
"""Switches and their only supported value, which is also the default."""

_SWITCHED_OFF: dict[Family, tuple[str, ...]] = {
    "chatglm": ("hidden_dropout", "attention_dropout", "classifier_dropout", "fp32_residual_connection"),
    "glm": ("attention_dropout",),
    "glm4": ("attention_dropout",),
}
"""Switches that change what the family's own code computes, and that nothing here computes: they must be
absent, null, false or 0."""

_ABSENT = ("quantization_config", "quantization_bit", "pre_seq_len", "vision_config")
"""Keys of model kinds that are not supported; they must be absent, null or 0."""

_CLASSES: dict[Family, tuple[str, str]] = {
    "chatglm": ("ChatGLMModel", "ChatGLMForSequenceClassification"),
    "glm": ("GlmForCausalLM", "GlmForSequenceClassification"),
    "glm4": ("Glm4ForCausalLM", "Glm4ForSequenceClassification"),
}
_CHATGLM_CODE = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
_KEPT_ACROSS_FAMILIES = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_cache")


def read_config(folder: str | Path) -> GLMConfig:
    """Return the model's shape from `config.json`.

    Args:
        folder: Hugging Face model folder.

    Raises:
        ModelFolderError: no such folder or file, not JSON, an unsupported model, a missing key or an invalid
            number; one sentence that names it.
    """
    folder = open_folder(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelFolderError(
            f"{folder} holds an adapter (adapter_config.json), not a whole model: merge it into its base "
            "model with peft's merge_and_unload(), write that with save_pretrained() and give its folder; "
            "where the weights are merged already, remove adapter_config.json"
        )
    path = plain_file(folder, "config.json")
    source = read_json(path)
    family = _family_of(source, path)
    for key, required in _FIXED[family].items():
        if source.get(key, required) not in (required, None):
            raise ModelFolderError(f"{path}: {key} is {source[key]!r:.80}; only {required!r} is supported")
    for key in _SWITCHED_OFF[family]:
        if source.get(key):
            what = "dropout" if key.endswith("dropout") else "residuals of another type than the weights"
            off = "0" if key.endswith("dropout") else "false"
            raise ModelFolderError(
                f"{path}: {key} is {source[key]!r:.80}; {what} is not supported: set it to {off}"
            )
    keys = _KEYS[family]
    counts = {
        field: _count(source, keys[field], path, _LARGEST.get(field, _LARGEST_SIZE))
        for field in keys
        if field not in ("norm_epsilon", "has_qkv_bias", "num_kv_heads")
    }
    has_interleaved_qkv = family == "chatglm" and not _flag(source, "multi_query_attention", False, path)
    if has_interleaved_qkv:
        counts["num_kv_heads"] = counts["num_heads"]
    else:
        counts["num_kv_heads"] = _count(source, keys["num_kv_heads"], path, _LARGEST_SIZE)
    rope_theta, rotary_fraction = _rotary_of(source, family, path)
    try:
        return GLMConfig(
            family=family,
            **counts,
            norm_epsilon=_number(source, keys["norm_epsilon"], path, upper=1.0),
            rope_theta=rope_theta,
            rotary_fraction=rotary_fraction,
            has_qkv_bias=_flag(source, keys["has_qkv_bias"], family != "chatglm", path),
            has_interleaved_qkv=has_interleaved_qkv,
            has_sandwich_norms=family == "glm4",
            has_score_bias=False,  # a folder's tensors tell; see `with_stored_score_bias`
            has_tied_head=_flag(source, "tie_word_embeddings", False, path),
            init_std=_number(source, "initializer_range", path, upper=10.0, default=0.02),
        )
    except ModelFolderError:
        raise
    except ValueError as error:
        raise ModelFolderError(f"{path}: {error}") from None


def _family_of(source: Mapping, path: Path) -> Family:
    model_type = source.get("model_type")
    if model_type is None:
        raise ModelFolderError(f"{path} has no model_type; {', '.join(_KEYS)} are supported")
    if "moe" in str(model_type) or "num_experts" in source:
        raise ModelFolderError(
            f"{path}: model_type {model_type!r:.80} is a mixture of experts, which is not supported yet; "
            f"{', '.join(_KEYS)} are"
        )
    if model_type not in list(_KEYS):
        raise ModelFolderError(
            f"{path}: model_type {model_type!r:.80} is not supported; {', '.join(_KEYS)} are"
        )
    if "position_encoding_2d" in source or "inner_hidden_size" in source:
        raise ModelFolderError(
            f"{path} describes the first ChatGLM-6B, another architecture; ChatGLM2 and later are supported"
        )
    for key in _ABSENT:
        if source.get(key):
            raise ModelFolderError(
                f"{path}: {key} is {source[key]!r:.80}; quantised, prefix-tuned and vision models are not "
                "supported"
            )
    return model_type


def _rotary_of(source: Mapping, family: Family, path: Path) -> tuple[float, float]:
    """Return the rotary base and the rotated fraction of each head."""
    nested = source.get("rope_parameters") or {}
    scaling = source.get("rope_scaling") or {}
    for key, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise ModelFolderError(f"{path}: {key} is {value!r:.80}; an object is required")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            raise ModelFolderError(
                f"{path}: {key} asks for {kind!r:.40} positions; only 'default' is supported: remove {key}, "
                "and the model works within its own context"
            )
    if family == "chatglm":
        ratio = _number(source, "rope_ratio", path, upper=1e9, default=1.0)
        if ratio != 1 and _divides_positions(source, path.parent):
            raise ModelFolderError(
                f"{path}: rope_ratio {ratio:g} divides positions in this model (ChatGLM2-6B-32K), which is "
                "not supported; ChatGLM3-6B-32K is"
            )
        return _ROPE_BASE * ratio, 0.5
    values = []
    for key, upper, default in (("rope_theta", 1e12, _ROPE_BASE), ("partial_rotary_factor", 1.0, 0.5)):
        if key in nested and key in source and nested[key] != source[key]:
            raise ModelFolderError(
                f"{path}: {key} is {source[key]!r} at the top and {nested[key]!r} under rope_parameters"
            )
        values.append(_number(nested if key in nested else source, key, path, upper=upper, default=default))
    return values[0], values[1]


def _divides_positions(source: Mapping, folder: Path) -> bool:
    if "chatglm2" in str(source.get("_name_or_path", "")).lower():
        return True
    if not (folder / "modeling_chatglm.py").exists():
        return False
    code = plain_file(folder, "modeling_chatglm.py").read_text(encoding="utf-8", errors="replace")
    return re.search(r"/\s*(self\.)?rope_ratio", code) is not None


def _count(source: Mapping, key: str, path: Path, largest: int) -> int:
    value = _required(source, key, path)
    if type(value) is not int or not 1 <= value <= largest:
        raise ModelFolderError(
            f"{path}: {key} is {value!r:.80}; a whole number from 1 to {largest} is required"
        )
    return value


def _number(source: Mapping, key: str, path: Path, *, upper: float, default: float | None = None) -> float:
    value = default if default is not None and source.get(key) is None else _required(source, key, path)
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= upper:
        raise ModelFolderError(
            f"{path}: {key} is {value!r:.80}; a number above 0, at most {upper:g}, is required"
        )
    return float(value)


def _flag(source: Mapping, key: str, default: bool, path: Path) -> bool:
    value = source.get(key, default)
    if not isinstance(value, bool):
        raise ModelFolderError(f"{path}: {key} is {value!r:.80}; true or false is required")
    return value


def _required(source: Mapping, key: str, path: Path) -> object:
    if key not in source:
        raise ModelFolderError(f"{path} has no {key}, which a {source['model_type']} model needs")
    return source[key]


def write_config(
    config: GLMConfig,
    folder: str | Path,
    source: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    has_value_head: bool = False,
) -> None:
    """Write `config.json` so that `read_config` returns `config` and transformers loads the folder.

    Args:
        config: the model.
        folder: an existing folder; a `config.json` in it is replaced.
        source: folder of the original model. From the same family all its other keys are kept, from another
            family only special token ids, dropout and cache use.
        dtype: of the weights; `None` keeps the source's entry.
        has_value_head: whether the model ends in a scalar head, which sets the class and `num_labels` 1.

    Raises:
        ModelFolderError: the source has no readable `config.json`.
        ValueError: the family's form cannot express this config.
    """
    family = config.family
    values = _kept(source, family)
    values["model_type"] = family
    values |= {key: getattr(config, field) for field, key in _KEYS[family].items()}
    if family == "chatglm":
        values = {"auto_map": _CHATGLM_CODE} | values | _chatglm_values(config)
    else:
        rotary = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_fraction}
        values |= {**_FIXED[family], **rotary, "rope_parameters": {"rope_type": "default", **rotary}}
        values.setdefault("pad_token_id", None)  # the default of the class may be outside the vocabulary
    values |= {"tie_word_embeddings": config.has_tied_head, "initializer_range": config.init_std}
    for key in ("id2label", "label2id", "num_labels"):
        values.pop(key, None)
    if has_value_head:
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one label
    if has_value_head or "architectures" not in values or _names_scalar_class(values["architectures"]):
        values["architectures"] = [_CLASSES[family][has_value_head]]
    if dtype is not None:
        values.pop("dtype", None)
        values["torch_dtype"] = str(dtype).removeprefix("torch.")  # transformers 4 and 5 both read this key
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    replace_text(Path(folder) / "config.json", text + "\n")


def names_scalar_class(folder: str | Path) -> bool | None:
    """Return whether `config.json` names a class with a scalar head; None where it names no class.

    Raises:
        ModelFolderError: no such folder or file, or not JSON.
    """
    architectures = read_json(plain_file(open_folder(folder), "config.json")).get("architectures")
    return _names_scalar_class(architectures) if architectures else None


def _names_scalar_class(architectures: object) -> bool:
    return any("SequenceClassification" in str(name) for name in architectures or ())


def _kept(source: str | Path | None, family: Family) -> dict:
    if source is None:
        return {}
    path = plain_file(open_folder(source), "config.json")
    values = read_json(path)
    if values.get("model_type") == family:
        return values
    return {key: values[key] for key in _KEPT_ACROSS_FAMILIES if key in values}


def _chatglm_values(config: GLMConfig) -> dict[str, object]:
    """Return further keys that the remote code needs; raise ValueError if it cannot express the config."""
    if config.has_tied_head:
        raise ValueError("has_tied_head is True; the chatglm form always has a head of its own")
    if config.rotary_fraction != 0.5:
        raise ValueError(
            f"rotary_fraction is {config.rotary_fraction}; the chatglm form rotates half of each head"
        )
    ratio = config.rope_theta / _ROPE_BASE
    return {
        **_FIXED["chatglm"],
        "rope_ratio": int(ratio) if ratio.is_integer() else ratio,
        "multi_query_attention": not config.has_interleaved_qkv,
    }
