"""Plain torch mathematics of gradient-in-forward: logits of a few rows wait for their gradient.

The kept logits of one chunk take `CHUNK_ELEMENTS` numbers, whatever the size of the vocabulary.
"""

from dataclasses import dataclass

import torch

from glm_rlhf.kernels.reference.linear_logprob import (
    TILE_COLUMNS,
    logits_gradient_,
    math_dtype,
    scaled,
    slices,
    statistics_of_logits,
)
from glm_rlhf.kernels.softmax_statistics import RowDistribution, SoftmaxStatistics

CHUNK_ELEMENTS = 1 << 23
"""32 MB of float32: 129 rows of a vocabulary of 65024."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLogits:
    """Tempered logits of some rows."""

    logits_TV: torch.Tensor
    """`[T, V]`, float32 or float64."""


def keep_logits(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_offset: int,
    temperature: float,
) -> tuple[SoftmaxStatistics, KeptLogits]:
    """Return the statistics of the rows and what `dlogits_of_kept` makes their gradient of."""
    dtype = math_dtype(hidden_TD)
    hidden_TD = scaled(hidden_TD.to(dtype), temperature)
    logits_TV = hidden_TD.new_empty(hidden_TD.shape[0], weight_VD.shape[0])
    statistics = None
    for columns in slices(weight_VD.shape[0], TILE_COLUMNS):
        torch.mm(hidden_TD, weight_VD[columns].to(dtype).t(), out=logits_TV[:, columns])
        local_targets_T = targets_T - (vocab_offset + columns.start)
        tile = statistics_of_logits(logits_TV[:, columns].clone(), local_targets_T)
        statistics = tile if statistics is None else statistics.merged(tile)
    if statistics is None:
        statistics = SoftmaxStatistics.empty(hidden_TD.shape[0], hidden_TD)
    return statistics, KeptLogits(logits_TV=logits_TV)


def dlogits_of_kept(
    kept: KeptLogits,
    targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor,
    dentropy_T: torch.Tensor | None,
    live: torch.Tensor | None,
    *,
    vocab_offset: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `(dlogits_LV, order)`: the gradient of the rows `live` (None: all); row k is `order[k]`."""
    if kept.logits_TV.shape[1] == 0:  # a shard that is padding only
        return kept.logits_TV if live is None else kept.logits_TV[live], live
    rows = slice(None) if live is None else live
    dlogits_LV = logits_gradient_(
        kept.logits_TV[rows],
        targets_T[rows] - vocab_offset,
        distribution.taken(live),
        dlogprob_T[rows],
        None if dentropy_T is None else dentropy_T[rows],
    )
    return scaled(dlogits_LV, temperature), live


def add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, is_first: bool) -> None:
    """Add `left @ right` to `out`, in the dtype of both; the first product overwrites it.

    `right` is converted a slice at a time: no float32 copy of a bf16 weight exists.
    """
    if is_first:
        out.zero_()
    for inner in slices(left.shape[1], TILE_COLUMNS):
        out.addmm_(left[:, inner], right[inner].to(out.dtype))


def rows_per_chunk(num_columns: int, hidden_TD: torch.Tensor) -> int:
    """Return how many rows of kept logits make `CHUNK_ELEMENTS`, at least 16."""
    return max(16, CHUNK_ELEMENTS // max(1, num_columns))
