"""The shapes of the published models, and tiny ones of every family for tests.

Source: each model's `config.json` on the Hugging Face hub. glm-4-9b is the base model; the chat model has the
same weight shapes and a larger rotary base (rope_ratio 500). `glm-4-9b-chat-1m` is not listed: it has 4 KV
heads and rope_ratio 10000.
"""

from dataclasses import replace
from difflib import get_close_matches

from glm_rlhf.parallel.spec.model_config import GLMConfig

_CHATGLM3_6B = GLMConfig(
    family="chatglm",
    num_layers=28,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=2,
    head_size=128,
    ffn_size=13696,
    vocab_size=65024,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    max_positions=8192,
)
_GLM_4_9B = GLMConfig(
    family="glm",
    num_layers=40,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=2,
    head_size=128,
    ffn_size=13696,
    vocab_size=151552,
    norm_epsilon=1.5625e-7,
    rope_theta=10000.0,
    max_positions=8192,
)
_GLM_4_0414_9B = replace(
    _GLM_4_9B, family="glm4", has_sandwich_norms=True, norm_epsilon=1e-5, max_positions=32768
)
_TINY = GLMConfig(
    family="glm",
    num_layers=4,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=2,
    head_size=16,
    ffn_size=96,
    vocab_size=128,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    max_positions=256,
)

PRESETS: dict[str, GLMConfig] = {
    "chatglm2-6b": replace(_CHATGLM3_6B, max_positions=32768),
    "chatglm3-6b": _CHATGLM3_6B,
    "glm-4-9b": _GLM_4_9B,
    "glm-4-9b-chat": replace(_GLM_4_9B, rope_theta=5e6, max_positions=131072),
    "glm-4-0414-9b": _GLM_4_0414_9B,
    "glm-4-0414-32b": replace(
        _GLM_4_0414_9B,
        num_layers=61,
        hidden_size=6144,
        num_heads=48,
        ffn_size=23040,
        has_qkv_bias=False,
    ),
    "tiny-chatglm": replace(_TINY, family="chatglm"),
    "tiny-glm": _TINY,
    "tiny-glm4": replace(_TINY, family="glm4", has_sandwich_norms=True),
}


def preset(name: str) -> GLMConfig:
    """Return the shape of the model called `name`.

    Raises:
        ValueError: no preset has that name; the message gives the nearest.
    """
    if name not in PRESETS:
        nearest = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.0)
        raise ValueError(
            f"there is no preset {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(PRESETS)}"
        )
    return PRESETS[name]
