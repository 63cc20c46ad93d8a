"""Model FLOP utilisation (MFU): the FLOP of a model's training, and the peak rates of known GPUs."""

import re

from glm_rlhf.engine.cost.hardware import GPUS
from glm_rlhf.engine.cost.pass_time import forward_flop
from glm_rlhf.parallel.spec.model_config import GLMConfig


def known_peak_flop_per_s(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU, by the name that its driver reports; None if it is unknown.

    PCIe cards are unknown: their peaks differ from those listed here.
    """
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    if "pcie" in words or "nvl" in words:
        return None
    peaks = {gpu.peak_flop_per_s for name, gpu in GPUS.items() if name.partition("-")[0] in words}
    return peaks.pop() if len(peaks) == 1 else None


def training_flop(
    glm: GLMConfig, *, num_sequences: float, mean_tokens: float, num_targets: float = 0.0
) -> float:
    """Return the FLOP of forward and backward over `num_sequences` sequences, without recomputation.

    Matrix products of the layers: 2 per weight and token. Causal attention: 2 · tokens² · heads · head size
    per layer and sequence, at the mean length. The vocabulary head: at `num_targets` tokens. Backward counts
    twice.

    Source: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B, with attention halved for its mask.
    """
    return 3 * forward_flop(glm, num_sequences, mean_tokens, num_targets)
