"""The share of what the GPUs could do at their peak that training used, where the peak is known."""

import re

from glm_rlhf.engine.cost.hardware import GPUS
from glm_rlhf.engine.cost.pass_time import forward_flop
from glm_rlhf.parallel.spec.model_config import GLMConfig


def known_peak_flop_per_s(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU by the name that its driver gives; None where it is not known.

    PCIe forms have other peaks than those that are known here.
    """
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    if "pcie" in words or "nvl" in words:
        return None
    peaks = {gpu.peak_flop_per_s for name, gpu in GPUS.items() if name.partition("-")[0] in words}
    return peaks.pop() if len(peaks) == 1 else None


def training_flop(
    glm: GLMConfig, *, num_sequences: float, mean_tokens: float, num_targets: float = 0.0
) -> float:
    """Return the operations of forward and backward over so many sequences, without recomputed layers.

    Matrix products of the layers, 2 a weight and token; causal attention, 2 · tokens² · heads · head size a
    layer and sequence, taken at the mean length; the vocabulary head at `num_targets` tokens. Backward
    counts twice.

    Source: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B, with attention halved for its mask.
    """
    return 3 * forward_flop(glm, num_sequences, mean_tokens, num_targets)
