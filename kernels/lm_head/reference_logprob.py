"""Logprobs of existing logits in plain torch, a few rows at a time.

No float32 copy of the whole `[T, V]` is made.
"""

from collections.abc import Iterator

import torch

from glm_rlhf.kernels.lm_head.reference_linear_logprob import (
    logits_gradient_,
    math_dtype,
    slices,
    statistics_of_logits,
)
from glm_rlhf.kernels.lm_head.softmax_statistics import RowDistribution, SoftmaxStatistics
from glm_rlhf.kernels.lm_head.targets import IGNORE_INDEX

TILE_ELEMENTS = 1 << 20
"""Float32 elements of one group of rows: 4 MB, about the second-level cache."""


def logits_statistics(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, vocab_offset: int, temperature: float
) -> SoftmaxStatistics:
    """Return the softmax statistics of each row; a row with `IGNORE_INDEX` is not read: (0, 1, 0, 0)."""
    dtype = math_dtype(logits_TV)
    maximum_T = torch.zeros(targets_T.shape, dtype=dtype, device=logits_TV.device)
    statistics = SoftmaxStatistics(maximum_T, *(torch.zeros_like(maximum_T) for _ in range(3)))
    statistics.sum_exp_T.fill_(1)
    for rows in _row_groups(logits_TV, targets_T):
        if logits_TV.shape[1] == 0:
            tile = SoftmaxStatistics.empty(rows.shape[0], maximum_T)
        else:
            logits_tile_TV = logits_TV.index_select(0, rows).to(dtype).div_(temperature)
            tile = statistics_of_logits(logits_tile_TV, targets_T[rows] - vocab_offset)
        for whole, part in zip(statistics, tile, strict=True):
            whole[rows] = part
    return statistics


def logits_gradient(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
    *,
    vocab_offset: int,
    temperature: float,
    out_TV: torch.Tensor,
) -> None:
    """Write d(loss)/d(logits) into `out_TV` (which may be `logits_TV`); ignored rows become exact zeros."""
    dtype = math_dtype(logits_TV)
    if logits_TV.shape[1] == 0:
        return
    for rows in _row_groups(logits_TV, targets_T):
        gradient_TV = logits_gradient_(
            logits_TV.index_select(0, rows).to(dtype).div_(temperature),
            targets_T[rows] - vocab_offset,
            distribution.taken(rows),
            None if dlogprob_T is None else dlogprob_T[rows],
            None if dentropy_T is None else dentropy_T[rows],
        )
        out_TV[rows] = gradient_TV.div_(temperature).to(out_TV.dtype)
    out_TV[targets_T == IGNORE_INDEX] = 0


def _row_groups(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = (targets_T != IGNORE_INDEX).nonzero().squeeze(1)
    for group in slices(rows.shape[0], max(1, TILE_ELEMENTS // max(1, logits_TV.shape[1]))):
        yield rows[group]
