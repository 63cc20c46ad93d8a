"""Model FLOP utilisation: peaks of devices that are known, and operations counted by hand."""

import pytest

from glm_rlhf.engine.observe.mfu import known_peak_flop_per_s, training_flop
from glm_rlhf.parallel.spec.model_config import GLMConfig


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_returned_only_if_it_is_known(name, peak):
    assert known_peak_flop_per_s(name) == peak


def test_operations_by_hand():
    glm = GLMConfig(
        family="glm",
        num_layers=2,
        hidden_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_size=4,
        ffn_size=16,
        vocab_size=10,
        norm_epsilon=1e-5,
        rope_theta=1e4,
        max_positions=64,
    )
    # Of a layer: queries and output 2 · 8 · 8, keys and values 2 · 8 · 4, gate, up and down 3 · 8 · 16.
    weights = 2 * (128 + 64 + 384)
    forward = 2 * 15 * weights + 2 * 3 * 25 * 2 * 8 + 2 * 9 * 10 * 8
    assert training_flop(glm, num_sequences=3, mean_tokens=5, num_targets=9) == 3 * forward
