"""Tiny models, data and rewards, written once so that both trees read the same bytes."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.same_bits import answer_rules

FAMILIES = ("chatglm", "glm", "glm4")
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, POSITIONS = 96, 48, 64, 4, 8, 2, 8, 512
NUM_RECORDS = 12


def write_inputs(folder: Path) -> Path:
    """Write what the rows name into a new folder, and return it.

    A policy of each family under its name; of ChatGLM also `other`, a second policy, and `reward`, a reward
    model.
    """
    folder.mkdir()
    for family in FAMILIES:
        _write_model(folder / family, family, seed=0)
    _write_model(folder / "other", "chatglm", seed=1)
    _write_model(folder / "reward", "chatglm", seed=2, is_scalar=True)
    generator = torch.Generator().manual_seed(3)
    for prefix, count in (("", NUM_RECORDS), ("eval_", 5)):
        _write_lines(
            folder / f"{prefix}prompts.jsonl", ({"prompt_tokens": _ids(generator, 9)} for _ in range(count))
        )
        _write_lines(
            folder / f"{prefix}demonstrations.jsonl",
            (
                {"prompt_tokens": _ids(generator, 9), "response_tokens": _ids(generator, 17)}
                for _ in range(count)
            ),
        )
        _write_lines(
            folder / f"{prefix}pairs.jsonl",
            (
                {
                    "prompt_tokens": _ids(generator, 7),
                    "chosen_tokens": _ids(generator, 13),
                    "rejected_tokens": _ids(generator, 13),
                }
                for _ in range(count)
            ),
        )
    shutil.copy(answer_rules.__file__, folder)
    return folder


def _ids(generator: torch.Generator, longest: int) -> list[int]:
    length = int(torch.randint(1, longest + 1, (), generator=generator))
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def _write_lines(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _write_model(folder: Path, family: str, *, seed: int, is_scalar: bool = False) -> None:
    """Write a Hugging Face folder of random fp32 weights, biases and norms too, so that each counts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        _chatglm_shapes(is_scalar) if family == "chatglm" else _glm_shapes(has_four_norms=family == "glm4")
    )
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = values * 0.15 if len(shape) > 1 else values * 0.3 + ("norm" in name)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = _chatglm_config(is_scalar) if family == "chatglm" else _glm_config(family)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _chatglm_shapes(is_scalar: bool) -> dict[str, tuple[int, ...]]:
    query, key_value = HEADS * HEAD_SIZE, 2 * KV_HEADS * HEAD_SIZE
    shapes = {"transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        within = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attention.query_key_value.weight": (query + key_value, HIDDEN),
            "self_attention.query_key_value.bias": (query + key_value,),
            "self_attention.dense.weight": (HIDDEN, query),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.dense_h_to_4h.weight": (2 * FFN, HIDDEN),
            "mlp.dense_4h_to_h.weight": (HIDDEN, FFN),
        }
        shapes |= {f"transformer.encoder.layers.{layer}.{name}": shape for name, shape in within.items()}
    shapes["transformer.encoder.final_layernorm.weight"] = (HIDDEN,)
    if is_scalar:
        return shapes | {"classifier_head.weight": (1, HIDDEN), "classifier_head.bias": (1,)}
    return shapes | {"transformer.output_layer.weight": (VOCAB, HIDDEN)}


def _glm_shapes(*, has_four_norms: bool) -> dict[str, tuple[int, ...]]:
    sizes = {"q": HEADS * HEAD_SIZE, "k": KV_HEADS * HEAD_SIZE, "v": KV_HEADS * HEAD_SIZE}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["post_self_attn_layernorm", "post_mlp_layernorm"] * has_four_norms
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        within = {f"self_attn.{name}_proj.weight": (size, HIDDEN) for name, size in sizes.items()}
        within |= {f"self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
        within |= {f"{norm}.weight": (HIDDEN,) for norm in norms}
        within |= {
            "self_attn.o_proj.weight": (HIDDEN, sizes["q"]),
            "mlp.gate_up_proj.weight": (2 * FFN, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, FFN),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in within.items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def _chatglm_config(is_scalar: bool) -> dict[str, object]:
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMForSequenceClassification" if is_scalar else "ChatGLMModel"],
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "kv_channels": HEAD_SIZE,
        "num_attention_heads": HEADS,
        "multi_query_attention": True,
        "multi_query_group_num": KV_HEADS,
        "padded_vocab_size": VOCAB,
        "layernorm_epsilon": 1e-5,
        "seq_length": POSITIONS,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _glm_config(family: str) -> dict[str, object]:
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {
        "model_type": family,
        "architectures": ["GlmForCausalLM" if family == "glm" else "Glm4ForCausalLM"],
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "head_dim": HEAD_SIZE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": POSITIONS,
        "attention_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", **rope},
        **rope,
    }
