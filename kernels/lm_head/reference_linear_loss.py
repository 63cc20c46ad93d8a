"""Gradient in forward in plain torch: the logits of a chunk of rows are kept until their gradient is known.

The kept logits of one chunk have `CHUNK_ELEMENTS` elements for any size of the vocabulary.
"""

from dataclasses import dataclass

import torch

from glm_rlhf.kernels.lm_head.reference_linear_logprob import (
    TILE_COLUMNS,
    exponentials_gradient_,
    math_dtype,
    scaled,
    slices,
    statistics_of_logits,
)
from glm_rlhf.kernels.lm_head.softmax_statistics import RowDistribution, SoftmaxStatistics

CHUNK_ELEMENTS = 1 << 23
"""32 MB of float32: 129 rows of a vocabulary of 65024."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKeptLogits:
    """Exponentials of the tempered logits z of some rows, in tiles of `TILE_COLUMNS` columns."""

    exp_TV: torch.Tensor
    """`[T, V]`, exp(z - the row's maximum in the tile), float32 or float64."""
    max_ST: torch.Tensor
    """`[tiles, T]`, the row's maximum in each tile."""


def keep_logits(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_offset: int,
    temperature: float,
) -> tuple[SoftmaxStatistics, ReferenceKeptLogits]:
    """Return the statistics of the rows, and the kept logits for `dlogits_of_kept`."""
    dtype = math_dtype(hidden_TD)
    hidden_TD = scaled(hidden_TD.to(dtype), temperature)
    exp_TV = hidden_TD.new_empty(hidden_TD.shape[0], weight_VD.shape[0])
    statistics, maxima = None, []
    for columns in slices(weight_VD.shape[0], TILE_COLUMNS):
        torch.mm(hidden_TD, weight_VD[columns].to(dtype).t(), out=exp_TV[:, columns])
        local_targets_T = targets_T - (vocab_offset + columns.start)
        tile = statistics_of_logits(exp_TV[:, columns], local_targets_T)
        maxima.append(tile.max_T)
        statistics = tile if statistics is None else statistics.merged(tile)
    if statistics is None:
        statistics = SoftmaxStatistics.empty(hidden_TD.shape[0], hidden_TD)
        return statistics, ReferenceKeptLogits(exp_TV=exp_TV, max_ST=statistics.max_T[None])
    return statistics, ReferenceKeptLogits(exp_TV=exp_TV, max_ST=torch.stack(maxima))


def dlogits_of_kept(
    kept: ReferenceKeptLogits,
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
    rows = slice(None) if live is None else live
    dlogits_LV, distribution = kept.exp_TV[rows], distribution.taken(live)
    for index, columns in enumerate(slices(dlogits_LV.shape[1], TILE_COLUMNS)):
        exponentials_gradient_(
            dlogits_LV[:, columns],
            kept.max_ST[index, rows],
            targets_T[rows] - (vocab_offset + columns.start),
            distribution,
            dlogprob_T[rows],
            None if dentropy_T is None else dentropy_T[rows],
        )
    return scaled(dlogits_LV, temperature), live


def add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, is_first: bool) -> None:
    """Add `left @ right` to `out`, in the dtype of both; the first product overwrites it.

    `right` is converted slice by slice: no float32 copy of a bf16 weight is made.
    """
    if is_first:
        out.zero_()
    for inner in slices(left.shape[1], TILE_COLUMNS):
        out.addmm_(left[:, inner], right[inner].to(out.dtype))


def rows_per_chunk(num_columns: int, hidden_TD: torch.Tensor) -> int:
    """Return the number of rows whose kept logits have `CHUNK_ELEMENTS` elements, at least 16."""
    return max(16, CHUNK_ELEMENTS // max(1, num_columns))
