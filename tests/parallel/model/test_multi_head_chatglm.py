"""A ChatGLM folder without `multi_query_attention` computes what the family's original code computes.

That code views the output of `query_key_value` as [tokens, heads, 3 · head size] and splits the last
dimension into query, key and value: the rows of one head lie side by side.
"""

import pytest
import torch
from scored_layouts import score_and_export
from tiny_models import as_multi_head, make_model, save_folder
from weight_folders import assert_same_bytes, load_all

from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.convert_folder import convert_folder

HEADS, HEAD, LAYERS, EPSILON = 8, 8, 4, 1e-5
LAYOUTS = ({}, {"tp": 2}, {"tp": 4, "sequence_parallel": True}, {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("multi_head")
    model = make_model("glm", num_key_value_heads=HEADS, rms_norm_eps=EPSILON)
    return as_multi_head(save_folder(path, "chatglm", model), HEADS)


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 96, (length,), generator=generator) for length in (7, 12, 3, 9)]


def original_logprobs(tensors: dict[str, torch.Tensor], tokens_T: torch.Tensor) -> torch.Tensor:
    """Return log p(token t | tokens before t), 0 for the first, as the original code computes them."""
    num_tokens = len(tokens_T)
    hidden_TD = tensors["transformer.embedding.word_embeddings.weight"][tokens_T]
    mask_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        layer = {
            name.removeprefix(f"transformer.encoder.layers.{i}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"transformer.encoder.layers.{i}.")
        }
        x_TD = norm(hidden_TD, layer["input_layernorm.weight"])
        mixed = x_TD @ layer["self_attention.query_key_value.weight"].T
        mixed = (mixed + layer["self_attention.query_key_value.bias"]).view(num_tokens, HEADS, 3 * HEAD)
        query, key, value = (part.transpose(0, 1) for part in mixed.chunk(3, dim=-1))
        scores_NTT = rotate(query) @ rotate(key).transpose(1, 2) / HEAD**0.5
        probabilities_NTT = scores_NTT.masked_fill(mask_TT, -torch.inf).softmax(-1)
        context_TD = (probabilities_NTT @ value).transpose(0, 1).reshape(num_tokens, HEADS * HEAD)
        hidden_TD = hidden_TD + context_TD @ layer["self_attention.dense.weight"].T
        x_TD = norm(hidden_TD, layer["post_attention_layernorm.weight"])
        gate, up = (x_TD @ layer["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        hidden_TD = hidden_TD + (torch.nn.functional.silu(gate) * up) @ layer["mlp.dense_4h_to_h.weight"].T
    hidden_TD = norm(hidden_TD, tensors["transformer.encoder.final_layernorm.weight"])
    logprobs_TV = (hidden_TD @ tensors["transformer.output_layer.weight"].T).log_softmax(-1)
    return torch.cat((torch.zeros(1), logprobs_TV[:-1].gather(1, tokens_T[1:, None]).squeeze(1)))


def norm(hidden_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    return hidden_TD * torch.rsqrt(hidden_TD.square().mean(-1, keepdim=True) + EPSILON) * weight_D


def rotate(states_NTH: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs of the first half of each head by position · base^(-2i / half)."""
    half = HEAD // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2) / half)
    angles_TH = torch.arange(states_NTH.shape[1])[:, None] * frequencies
    even, odd = states_NTH[..., 0:half:2], states_NTH[..., 1:half:2]
    cos, sin = angles_TH.cos(), angles_TH.sin()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((turned, states_NTH[..., half:]), dim=-1)


def test_every_layout_computes_the_original_and_exports_its_bytes(ranks, folder, tmp_path):
    config = read_config(folder)
    assert config.has_interleaved_qkv
    assert config.num_kv_heads == HEADS
    tensors = load_all(folder)
    expected = [original_logprobs(tensors, sequence) for sequence in sequences()]
    for worst in ranks.run(score_and_export, folder, tmp_path, LAYOUTS, sequences(), expected):
        assert max(worst) < 2e-5, "fp32 rounding; rows of another order are off by whole nats"
    for index in range(len(LAYOUTS)):
        assert_same_bytes(load_all(tmp_path / str(index)), tensors)
        assert read_config(tmp_path / str(index)) == config


def test_a_conversion_to_glm_and_back_computes_the_same(folder, tmp_path):
    """The glm form has three tensors, and the chatglm form of that has groups of one head."""
    convert_folder(folder, tmp_path / "glm", family="glm")
    convert_folder(tmp_path / "glm", tmp_path / "grouped", family="chatglm")
    fused = load_all(folder)["transformer.encoder.layers.2.self_attention.query_key_value.weight"]
    parts = fused.view(HEADS, 3, HEAD, -1).transpose(0, 1).reshape(3, HEADS * HEAD, -1)
    split = load_all(tmp_path / "glm")
    for part, letter in zip(parts, "qkv", strict=True):
        assert torch.equal(part, split[f"model.layers.2.self_attn.{letter}_proj.weight"])
    assert not read_config(tmp_path / "grouped").has_interleaved_qkv
    grouped = load_all(tmp_path / "grouped")
    assert torch.equal(
        torch.cat(tuple(parts)),
        grouped["transformer.encoder.layers.2.self_attention.query_key_value.weight"],
    )
