"""Tiny random checkpoints of every family, with the results of transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    Glm4ForSequenceClassification,
    GlmConfig,
    GlmForCausalLM,
    GlmForSequenceClassification,
)

FAMILIES = ("glm", "glm4", "chatglm")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": None,  # else transformers gives token 0 of the embedding no gradient
    "eos_token_id": 2,
    "attention_bias": True,
}


def make_model(family: str, seed: int = 0, *, has_score: bool = False, **changes):
    """Return a random fp32 transformers model; norms and biases are random too, so that swaps are found.

    With `has_score` it is of the family's class for sequence classification, `num_labels` 1 unless changed.
    """
    classes = (GlmConfig, GlmForCausalLM, GlmForSequenceClassification)
    if family == "glm4":
        classes = (Glm4Config, Glm4ForCausalLM, Glm4ForSequenceClassification)
    config, model = classes[0], classes[1 + has_score]
    if has_score:
        changes = {"num_labels": 1} | changes
    torch.manual_seed(seed)
    built = model(config(**(SHAPE | changes), attn_implementation="eager")).float().eval()
    for name, parameter in built.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    return built


def save_folder(folder: Path, family: str, model=None, **save_options) -> Path:
    """Write `model` (a new one when None) as a Hugging Face folder of `family` and return the folder."""
    model = make_model(family) if model is None else model
    model.save_pretrained(folder, **save_options)
    if family == "chatglm":
        _as_chatglm(folder)
    return folder


def in_family(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of `GlmForCausalLM` under the family's names: ChatGLM joins query, key and value."""
    if family != "chatglm":
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            renamed[_chatglm_name(name.replace("q_proj", "query_key_value"))] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[_chatglm_name(name)] = tensor
    return renamed


def as_multi_head(folder: Path, num_heads: int) -> Path:
    """Turn a ChatGLM folder whose groups are single heads into one without `multi_query_attention`.

    Only the keys change. The rows stay, and so are those of another model, as random as the first.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("multi_query_group_num") == config["num_attention_heads"] == num_heads
    del config["multi_query_attention"]
    path.write_text(json.dumps(config))
    return folder


def _as_chatglm(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = in_family("chatglm", load_file(path))
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    glm = json.loads((folder / "config.json").read_text())
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": glm["num_hidden_layers"],
        "hidden_size": glm["hidden_size"],
        "ffn_hidden_size": glm["intermediate_size"],
        "kv_channels": glm["head_dim"],
        "num_attention_heads": glm["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": glm["num_key_value_heads"],
        "padded_vocab_size": glm["vocab_size"],
        "layernorm_epsilon": glm["rms_norm_eps"],
        "seq_length": glm["max_position_embeddings"],
        "add_bias_linear": False,
        "add_qkv_bias": glm["attention_bias"],
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _chatglm_name(name: str) -> str:
    for part, legacy in (
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("lm_head", "transformer.output_layer"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.layers", "transformer.encoder.layers"),
        ("self_attn.query_key_value", "self_attention.query_key_value"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ):
        name = name.replace(part, legacy)
    return name


def reference_logprobs(model, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return log p(token t | tokens before t) of each sequence run alone; 0 at its first token."""
    answers = []
    for sequence in sequences:
        logprobs = model(sequence[None]).logits[0].float().log_softmax(-1)
        chosen = logprobs[:-1].gather(1, sequence[1:, None]).squeeze(1)
        answers.append(torch.cat((chosen.new_zeros(1), chosen)))
    return answers


def reference_gradients(model, sequences: list[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean next-token loss over all tokens and its gradient by parameter name."""
    model.zero_grad()
    num_targets = sum(len(sequence) - 1 for sequence in sequences)
    loss = -sum(chosen.sum() for chosen in reference_logprobs(model, sequences)) / num_targets
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
