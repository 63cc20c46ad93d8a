"""Sampling of the next token with temperature, top-k and top-p."""

import torch

from glm_rlhf.kernels.decoding.sampling_shard import (
    MAX_VOCAB_SIZE,
    Samples,
    check_sampling,
    combine_shards,
    tile_statistics,
)
from glm_rlhf.kernels.decoding.top_k_top_p import truncation_threshold

__all__ = ["Samples", "sample"]


def sample(
    logits_BV: torch.Tensor,
    *,
    seeds_B: torch.Tensor,
    steps_B: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    masked_ids_V: torch.Tensor | None = None,
) -> Samples:
    """Return one sampled token per row with its logprobs, under the sampling and the untempered distribution.

    token[b] = argmax_i (logits[b, i] / temperature − log E[b, i]) over the kept ids i, where the E[b, i] are
    independent and exponentially distributed: a sample from the softmax of the kept logits / temperature.
    E[b, i] is a function of (seeds[b], steps[b], i), so a row's token depends on its own logits, seed and
    step, not on its batch. The kernel and the CPU sample the same tokens, except where two ids tie to within
    rounding. Order of operations: mask, temperature, top-k, then top-p among the ids that top-k keeps.

    Args:
        logits_BV: [B, V], V ≤ 2^24, fp32, bf16 or fp16 (fp64 on CPU); computed in fp32. May hold −∞.
        seeds_B: int64 [B], one per sequence.
        steps_B: int64 [B], a number that differs between samples of one sequence, such as the position.
        temperature: ≥ 0, a number or fp32 [B]; 0 takes the largest logit, the lowest id among equals.
        top_k: a number or int32 [B]; 0 for no limit. All ids whose logit equals the k-th largest are kept.
        top_p: in (0, 1], a number or fp32 [B]; 1 for no limit. Equal logits are kept or removed together.
        masked_ids_V: bool [V], True for ids that are never sampled (rows without a token); None for none.

    Returns:
        `Samples`.

    Raises:
        ValueError: shapes or dtypes do not fit, or a number is out of range. Tensors of temperature, top-k
            and top-p are checked on CPU only: on CUDA the host would wait for the device.

    Source: the Gumbel-max trick (Maddison et al., "A* sampling", 2014), as a race of exponentials.
    """
    check_sampling(logits_BV, seeds_B, steps_B, masked_ids_V)
    batch, device = logits_BV.shape[0], logits_BV.device
    largest = torch.finfo(torch.float32).max
    temperature_B = _per_row("temperature", temperature, batch, device, torch.float32, 0.0, largest)
    top_k_B = top_p_B = None
    if isinstance(top_k, torch.Tensor) or top_k != 0:
        top_k_B = _per_row("top_k", top_k, batch, device, torch.int32, 0, MAX_VOCAB_SIZE)
    if isinstance(top_p, torch.Tensor) or top_p != 1.0:
        smallest = torch.finfo(torch.float32).tiny
        top_p_B = _per_row("top_p", top_p, batch, device, torch.float32, smallest, 1.0)
    threshold_B = None
    if top_k_B is not None or top_p_B is not None:
        threshold_B = truncation_threshold(
            logits_BV.contiguous(),
            temperature_B=temperature_B,
            top_k_B=top_k_B,
            top_p_B=top_p_B,
            masked_ids_V=masked_ids_V,
        )
    statistics_SB8 = tile_statistics(
        logits_BV,
        seeds_B=seeds_B,
        steps_B=steps_B,
        temperature_B=temperature_B,
        masked_ids_V=masked_ids_V,
        threshold_B=threshold_B,
    )
    return combine_shards(statistics_SB8)


def _per_row(
    name: str,
    setting: float | torch.Tensor,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    low: float,
    high: float,
) -> torch.Tensor:
    """Return a setting as one number per row; checked unless the host would wait for the device."""
    if not isinstance(setting, torch.Tensor):
        if not low <= setting <= high:
            raise ValueError(f"{name} is {setting}, required is a number in [{low}, {high}]")
        return torch.full((batch,), setting, dtype=dtype, device=device)
    if setting.shape != (batch,) or setting.dtype != dtype:
        raise ValueError(f"{name} is {tuple(setting.shape)} {setting.dtype}, required is {dtype} [{batch}]")
    if not setting.is_cuda and batch and not (low <= setting.min() and setting.max() <= high):
        raise ValueError(
            f"{name} holds {setting.min()} to {setting.max()}, required are numbers in [{low}, {high}]"
        )
    return setting
