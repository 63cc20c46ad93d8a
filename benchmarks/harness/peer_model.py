"""The model of transformers that ours is compared with: a small GLM of random weights."""

from collections.abc import Mapping
from typing import Any

import torch

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "attention_bias": True,
    "pad_token_id": None,
    "eos_token_id": 2,
}
"""Arguments of `GlmConfig`."""


def random_glm(
    shape: Mapping[str, Any], *, of: str = "GlmForCausalLM", seed: int = 0, **options: Any
) -> torch.nn.Module:
    """Return transformers' class `of` with random weights in fp32, for evaluation."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    return getattr(transformers, of)(transformers.GlmConfig(**shape, **options)).float().eval()


def shape_text(shape: Mapping[str, Any]) -> str:
    """Return the sizes of a shape for people."""
    return ", ".join(f"{name} {value}" for name, value in shape.items() if value is not None)
