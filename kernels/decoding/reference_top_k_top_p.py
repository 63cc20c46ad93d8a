"""The smallest logit that top-k and top-p keep, by sorting."""

import numpy as np
import torch

from glm_rlhf.kernels.decoding.reference_sampling import INVERSE_HIGH, INVERSE_LOW


def truncation_threshold(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor | None,
    top_p_B: torch.Tensor | None,
    masked_ids_V: torch.Tensor | None,
) -> torch.Tensor:
    """Return threshold [B]: a token is kept if its unmasked logit is at least threshold; −∞ keeps all.

    top-k keeps v if fewer than k allowed logits exceed it. top-p keeps v if the probability of the allowed
    tokens that exceed it, under the tempered distribution truncated by top-k, is below p.
    """
    dtype = torch.float64 if logits_BV.dtype == torch.float64 else torch.float32
    logits_BV = logits_BV.to(dtype)
    if masked_ids_V is not None:
        logits_BV = logits_BV.masked_fill(masked_ids_V, -torch.inf)
    # numpy's vectorised sort is many times as fast as torch's on such rows.
    ascending_BV = torch.from_numpy(np.sort(logits_BV.cpu().numpy(), axis=-1)).to(logits_BV.device)
    vocab_size = logits_BV.shape[1]
    threshold_B = torch.full((logits_BV.shape[0],), -torch.inf, dtype=dtype, device=logits_BV.device)
    if top_k_B is not None:
        position_B = (vocab_size - top_k_B.long()).clamp(0, vocab_size - 1)
        kth_B = ascending_BV.gather(1, position_B[:, None])[:, 0]
        threshold_B = torch.where(top_k_B > 0, kth_B, threshold_B)
    if top_p_B is not None:
        descending_BV = ascending_BV.flip(1)
        # Temperature 0 takes the maximum in any case; the factor 1 avoids NaN in its row.
        inverse_B = torch.where(temperature_B > 0, 1.0 / temperature_B, 1.0).to(dtype)
        inverse_B1 = inverse_B.clamp(INVERSE_LOW, INVERSE_HIGH)[:, None]
        weights_BV = ((descending_BV - descending_BV[:, :1]) * inverse_B1).exp()
        weights_BV.masked_fill_(descending_BV < threshold_B[:, None], 0.0)
        cumulative_BV = weights_BV.cumsum(1, dtype=torch.float64)
        mass_above_BV = cumulative_BV - weights_BV
        num_kept_B = (mass_above_BV < top_p_B.double()[:, None] * cumulative_BV[:, -1:]).sum(1)
        last_B = descending_BV.gather(1, (num_kept_B - 1).clamp_(min=0)[:, None])[:, 0]
        threshold_B = torch.where(top_p_B < 1.0, torch.maximum(threshold_B, last_B), threshold_B)
    return torch.where(temperature_B > 0, threshold_B, -torch.inf)
