"""The vocabulary head in plain torch, tile by tile so that no `[T, V]` is materialised.

Computes in float64 for float64 inputs and in float32 otherwise. One tile is `TILE_ROWS` rows by
`TILE_COLUMNS` columns of the vocabulary; memory in addition to inputs and outputs does not grow with T or V.
"""

from collections.abc import Iterator

import torch

from glm_rlhf.kernels.lm_head.softmax_statistics import (
    LOWEST_EXPONENT,
    RowDistribution,
    SoftmaxStatistics,
    finite_anchor,
)

TILE_ROWS = 256
TILE_COLUMNS = 4096
CACHED_ROWS = 32
"""Rows of a tile that are processed together in elementwise steps: half a megabyte stays in the cache."""


def shard_statistics(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_offset: int,
    temperature: float,
) -> SoftmaxStatistics:
    """Return the softmax statistics of `hidden_TD @ weight_VD.T / temperature`, see `SoftmaxStatistics`.

    Args:
        hidden_TD: `[T, D]`.
        weight_VD: `[V, D]`, rows `vocab_offset ... vocab_offset + V - 1` of the vocabulary.
        targets_T: int `[T]`, ids in the whole vocabulary.
        vocab_offset: id of the shard's first row.
        temperature: divides the logits, > 0.
    """
    dtype = math_dtype(hidden_TD)
    tiles = []
    for rows in slices(hidden_TD.shape[0], TILE_ROWS):
        # Rows are the outer loop: the tile of hidden is converted once and the running sums stay small.
        hidden_tile_TD = scaled(hidden_TD[rows].to(dtype), temperature)
        running = None
        for columns in slices(weight_VD.shape[0], TILE_COLUMNS):
            logits_TV = hidden_tile_TD @ weight_VD[columns].to(dtype).t()
            local_targets_T = targets_T[rows] - (vocab_offset + columns.start)
            tile = statistics_of_logits(logits_TV, local_targets_T)
            running = tile if running is None else running.merged(tile)
        tiles.append(running or SoftmaxStatistics.empty(hidden_tile_TD.shape[0], hidden_tile_TD))
    if not tiles:
        return SoftmaxStatistics.empty(0, hidden_TD.new_empty(0, dtype=dtype))
    return SoftmaxStatistics(*(torch.cat(parts) for parts in zip(*tiles, strict=True)))


def shard_gradients(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
    *,
    vocab_offset: int,
    temperature: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return `(dhidden_TD, dweight_VD)`, the shard's contribution, from recomputed logits.

    dz_j = dlogprob * (1[j = target] - p_j) - dentropy * p_j * (log p_j + entropy),
    p_j = exp(z_j - max - log_sum).

    `dhidden_TD` is the sum over this shard's columns in the compute dtype; the caller sums over shards.
    `dweight_VD` is accumulated likewise and rounded once to the weight's dtype.
    """
    dtype = math_dtype(hidden_TD)
    dhidden_TD = torch.zeros(hidden_TD.shape, dtype=dtype, device=hidden_TD.device) if wants_hidden else None
    dweight_VD = torch.empty_like(weight_VD) if wants_weight else None
    for columns in slices(weight_VD.shape[0], TILE_COLUMNS):
        weight_tile_VD = weight_VD[columns].to(dtype)
        dweight_tile_VD = torch.zeros_like(weight_tile_VD) if wants_weight else None
        for rows in slices(hidden_TD.shape[0], TILE_ROWS):
            hidden_tile_TD = scaled(hidden_TD[rows].to(dtype), temperature)
            dlogits_TV = logits_gradient_(
                hidden_tile_TD @ weight_tile_VD.t(),
                targets_T[rows] - (vocab_offset + columns.start),
                distribution.taken(rows),
                None if dlogprob_T is None else dlogprob_T[rows],
                None if dentropy_T is None else dentropy_T[rows],
            )
            if wants_hidden:
                dhidden_TD[rows].addmm_(dlogits_TV, weight_tile_VD, alpha=1 / temperature)
            if wants_weight:  # the tile of hidden already carries 1 / temperature
                dweight_tile_VD.addmm_(dlogits_TV.t(), hidden_tile_TD)
        if wants_weight:
            dweight_VD[columns] = dweight_tile_VD
    return dhidden_TD, dweight_VD


def statistics_of_logits(logits_TV: torch.Tensor, local_targets_T: torch.Tensor) -> SoftmaxStatistics:
    """Return the statistics of one tile of tempered logits z, which is overwritten with exp(z - max).

    `local_targets_T` counts from the tile's first column; ids outside the tile are ignored.
    """
    safe_targets_T, is_owned_T = owned(local_targets_T, logits_TV.shape[1])
    target_T = torch.where(is_owned_T, logits_TV.gather(1, safe_targets_T[:, None]).squeeze(1), 0)
    max_T = logits_TV.amax(dim=1)
    anchor_T = finite_anchor(max_T)
    sum_exp_T, weighted_sum_T = torch.empty_like(max_T), torch.empty_like(max_T)
    for rows in slices(logits_TV.shape[0], CACHED_ROWS):
        shifted_TV = (logits_TV[rows] - anchor_T[rows, None]).clamp_(min=LOWEST_EXPONENT)
        exp_TV = torch.exp(shifted_TV, out=logits_TV[rows])
        sum_exp_T[rows] = exp_TV.sum(dim=1)
        weighted_sum_T[rows] = shifted_TV.mul_(exp_TV).sum(dim=1)
    return SoftmaxStatistics(max_T, sum_exp_T, weighted_sum_T, target_T)


def logits_gradient_(
    logits_TV: torch.Tensor,
    local_targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
) -> torch.Tensor:
    """Return the gradient with respect to one tile of tempered logits, which is overwritten."""
    for rows in slices(logits_TV.shape[0], CACHED_ROWS):
        part = distribution.taken(rows)
        logp_TV = (
            logits_TV[rows]
            .sub_(part.max_T[:, None])
            .sub_(part.log_sum_T[:, None])
            .clamp_(min=LOWEST_EXPONENT)
        )
        if dentropy_T is None:
            logp_TV.exp_().mul_(-dlogprob_T[rows, None])
        else:
            probability_TV = logp_TV.exp()
            _entropy_gradient_(logp_TV, probability_TV, part.entropy_T, dlogprob_T, dentropy_T, rows)
    return _add_at_target_(logits_TV, local_targets_T, dlogprob_T)


def exponentials_gradient_(
    exp_TV: torch.Tensor,
    max_T: torch.Tensor,
    local_targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
) -> torch.Tensor:
    """Return the result of `logits_gradient_` for a tile that `statistics_of_logits` has overwritten.

    `max_T` is the tile's own maximum, the reference of its exponentials.
    """
    log_scale_T = (finite_anchor(max_T) - distribution.max_T) - distribution.log_sum_T
    for rows in slices(exp_TV.shape[0], CACHED_ROWS):
        tile_TV, tile_log_scale_T = exp_TV[rows], log_scale_T[rows, None]
        if dentropy_T is None:
            tile_TV.mul_(-dlogprob_T[rows, None] * tile_log_scale_T.exp())
        else:
            logp_TV = tile_TV.log().add_(tile_log_scale_T).clamp_(min=LOWEST_EXPONENT)
            probability_TV = tile_TV.mul_(tile_log_scale_T.exp())
            entropy_T = distribution.entropy_T[rows]
            _entropy_gradient_(logp_TV, probability_TV, entropy_T, dlogprob_T, dentropy_T, rows)
            tile_TV.copy_(logp_TV)
    return _add_at_target_(exp_TV, local_targets_T, dlogprob_T)


def _entropy_gradient_(
    logp_TV: torch.Tensor,
    probability_TV: torch.Tensor,
    entropy_T: torch.Tensor,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor,
    rows: slice,
) -> None:
    """Overwrite `logp_TV` with -p * (dlogprob + dentropy * (log p + entropy))."""
    constant_T = dentropy_T[rows] * entropy_T
    constant_T = constant_T if dlogprob_T is None else constant_T + dlogprob_T[rows]
    logp_TV.mul_(-dentropy_T[rows, None]).sub_(constant_T[:, None]).mul_(probability_TV)


def _add_at_target_(
    gradient_TV: torch.Tensor, local_targets_T: torch.Tensor, dlogprob_T: torch.Tensor | None
) -> torch.Tensor:
    if dlogprob_T is not None:
        safe_targets_T, is_owned_T = owned(local_targets_T, gradient_TV.shape[1])
        gradient_TV.scatter_add_(1, safe_targets_T[:, None], torch.where(is_owned_T, dlogprob_T, 0)[:, None])
    return gradient_TV


def owned(local_targets_T: torch.Tensor, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(column to read, whether it is the target's)` for each row of a tile."""
    is_owned_T = (local_targets_T >= 0) & (local_targets_T < num_columns)
    return torch.where(is_owned_T, local_targets_T, 0).long(), is_owned_T


def math_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return float64 for float64 inputs (the reference of the tests), else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scaled(tensor: torch.Tensor, temperature: float) -> torch.Tensor:
    return tensor if temperature == 1.0 else tensor / temperature


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
