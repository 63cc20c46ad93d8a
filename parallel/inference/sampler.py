"""Sampling of the next token per row, equal on all tensor-parallel ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from glm_rlhf.kernels.decoding.sampling import sample
from glm_rlhf.kernels.decoding.sampling_shard import MAX_VOCAB_SIZE, Samples, combine_shards, sample_shard
from glm_rlhf.kernels.decoding.top_k_top_p import truncation_threshold

_LOWEST, _HIGHEST = 1e-6, 1e6  # of temperatures at which log-probabilities can be computed too


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """The distribution that tokens are sampled from; equal for all rows."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Sample among the k most likely ids; 0 for all."""
    top_p: float = 1.0
    """Sample among the most likely ids with this total probability; 1 for all."""
    masked_ids_V: torch.Tensor | None = None
    """bool [V], ids that are never sampled: rows of the embedding without a token. None masks nothing."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LOWEST <= self.temperature <= _HIGHEST:
            raise ValueError(
                f"temperature is {self.temperature}, required is 0 or a number from {_LOWEST} to {_HIGHEST}"
            )
        if not 0 <= self.top_k <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"top_k is {self.top_k}, required is 0 (no limit) or a number of ids up to {MAX_VOCAB_SIZE}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, required is a number above 0, at most 1")


def sample_tokens(
    logits_BV: torch.Tensor,
    seeds_B: torch.Tensor,
    steps_B: torch.Tensor,
    settings: SamplingSettings,
    *,
    group: dist.ProcessGroup | None = None,
) -> Samples:
    """Return one token per row with its logprobs, equal on all ranks of `group`.

    Ranks all-gather 32 bytes per row. Only top-k and top-p need whole rows: then the logits are gathered too.

    Args:
        logits_BV: this rank's columns, fp32 [B, V / tp], ranks in order.
        seeds_B: int64 [B].
        steps_B: int64 [B], number of tokens sampled before for each sequence.
        settings: the distribution.
        group: the tensor-parallel group; None for one rank.
    """
    options = {"seeds_B": seeds_B, "steps_B": steps_B}
    if group is None:
        return sample(
            logits_BV,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            masked_ids_V=settings.masked_ids_V,
            **options,
        )
    batch, num_columns = logits_BV.shape
    offset = group.rank() * num_columns
    masked = settings.masked_ids_V
    temperature_B = torch.full((batch,), settings.temperature, device=logits_BV.device)
    statistics_B8 = sample_shard(
        logits_BV,
        temperature_B=temperature_B,
        masked_ids_V=None if masked is None else masked[offset : offset + num_columns],
        threshold_B=_threshold(logits_BV, temperature_B, settings, group),
        vocab_offset=offset,
        **options,
    )
    gathered = statistics_B8.new_empty(group.size() * batch, statistics_B8.shape[1])
    dist.all_gather_into_tensor(gathered, statistics_B8.contiguous(), group=group)
    return combine_shards(gathered.unflatten(0, (group.size(), batch)))


def _threshold(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, settings: SamplingSettings, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """Return the smallest logit that top-k and top-p keep, from whole rows; None without top-k and top-p."""
    if settings.top_k == 0 and settings.top_p == 1.0:
        return None
    batch, num_columns = logits_BV.shape
    gathered = logits_BV.new_empty(group.size() * batch, num_columns)
    dist.all_gather_into_tensor(gathered, logits_BV.contiguous(), group=group)
    whole_BV = gathered.unflatten(0, (group.size(), batch)).transpose(0, 1).flatten(1).contiguous()
    device = logits_BV.device
    return truncation_threshold(
        whole_BV,
        temperature_B=temperature_B,
        top_k_B=torch.full((batch,), settings.top_k, dtype=torch.int32, device=device)
        if settings.top_k
        else None,
        top_p_B=torch.full((batch,), settings.top_p, device=device) if settings.top_p < 1 else None,
        masked_ids_V=settings.masked_ids_V,
    )
