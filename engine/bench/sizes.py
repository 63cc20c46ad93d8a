"""Sizes of what `bench` measures, on a CPU and on CUDA."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from glm_rlhf.engine.config.bench import BenchSection
from glm_rlhf.engine.cost.hardware import shape_of
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.presets import preset

SMALL = GLMConfig(
    family="glm",
    num_layers=4,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    ffn_size=704,
    vocab_size=4096,
    norm_epsilon=1e-5,
    rope_theta=1e4,
    max_positions=2048,
)
_NUM_LENGTHS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Model and batches of all parts."""

    model: GLMConfig
    """Shape of every model, its layers cut down."""
    dtype: torch.dtype
    """Of weights and activations."""
    lengths: tuple[int, ...]
    """Tokens of each training sequence: quantiles of a log-normal distribution, shuffled."""
    batch: int
    """Sequences of a micro-batch."""
    num_prompts: int
    """Prompts of generation and of PPO's iteration."""
    prompt_tokens: int
    """Of each."""
    new_tokens: int
    """Of each answer; no stop id ends it."""
    tokens: int
    """Tokens of a data-parallel rank's step in weak scaling, of all ranks together in strong scaling."""
    length: int
    """Tokens of a sequence there."""

    def text(self) -> str:
        """Return the model's shape for people."""
        model = self.model
        return (
            f"GLM of {model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads on "
            f"{model.num_kv_heads} of {model.head_size}, FFN {model.ffn_size}, vocabulary "
            f"{model.vocab_size}; random weights, {str(self.dtype).removeprefix('torch.')}"
        )


def sizes_for(section: BenchSection, device: torch.device) -> Sizes:
    """Return the sizes for a kind of device.

    Raises:
        ValueError: `bench.model` is neither a preset nor a folder.
    """
    is_cuda = device.type == "cuda"
    if section.model is None:
        model = preset("chatglm3-6b") if is_cuda else SMALL
    else:
        model = shape_of(section.model)
    # The families differ in names alone; transformers has a class for these two.
    family = "glm4" if model.has_sandwich_norms else "glm"
    return Sizes(
        model=replace(model, num_layers=section.layers, family=family),
        dtype=torch.bfloat16 if is_cuda else torch.float32,
        lengths=_long_tail(median=400 if is_cuda else 50),
        batch=8,
        num_prompts=128 if is_cuda else 16,
        prompt_tokens=256 if is_cuda else 32,
        new_tokens=256 if is_cuda else 32,
        tokens=16384 if is_cuda else 1024,
        length=1024 if is_cuda else 64,
    )


def ranks_for(section: BenchSection) -> Sequence[int]:
    """Return the numbers of ranks that scaling is measured at."""
    if section.ranks is not None:
        return section.ranks
    most = torch.cuda.device_count() or max(2, min(4, os.cpu_count() or 1))
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _long_tail(*, median: int) -> tuple[int, ...]:
    """Return quantiles: a random sample of so few lengths could miss the tail."""
    order = torch.randperm(_NUM_LENGTHS, generator=torch.Generator().manual_seed(3)).tolist()
    normal = [NormalDist().inv_cdf((index + 0.5) / _NUM_LENGTHS) for index in range(_NUM_LENGTHS)]
    return tuple(round(median * math.exp(0.9 * normal[index])) for index in order)
