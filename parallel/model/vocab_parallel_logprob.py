"""Vocabulary-parallel logprobs: each rank holds a slice of the vocabulary, small reductions combine them.

Reductions over the group, for R rows that have a target:

| function | forward | backward |
|---|---|---|
| `linear_logprob` | MAX of 4 R bytes, SUM of 12 R bytes | SUM of 4 R D bytes, 0 if the caller reduces |
| `logprobs_from_logits` | MAX of 4 T bytes, SUM of 12 T bytes | none |

(Bytes of the float32 buffers passed to `all_reduce`; float64 inputs, used by tests only, double them.)
Shards are of equal size and in rank order, as in Megatron-core: rank r of n holds the V / n ids from r V / n.
Every rank of the group must call, with the same hidden states, targets and temperature.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from glm_rlhf.kernels.lm_head.linear_logprob import IGNORE_INDEX, sharded_linear_logprob
from glm_rlhf.kernels.lm_head.logprob import sharded_logprobs_from_logits
from glm_rlhf.kernels.lm_head.softmax_statistics import SoftmaxStatistics

__all__ = ["IGNORE_INDEX", "linear_logprob", "logprobs_from_logits"]


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD_shard: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    reduces_hidden_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(logprobs_T, entropy_T)` of `kernels.linear_logprob`, the vocabulary sharded over `group`.

    The gradient of a rank's weight shard is complete on that rank. The gradient of hidden is a sum over the
    vocabulary, hence over ranks:

    - `reduces_hidden_gradient=True`: backward all-reduces it in float32, and every rank receives the whole
      gradient. For hidden that is replicated on all ranks (no sequence parallelism). Do not put
      `copy_to_tensor_model_parallel_region` before it: the gradient would be summed twice.
    - `reduces_hidden_gradient=False`: every rank receives its own partial gradient, rounded to hidden's
      dtype, and the operation that produced hidden sums them. For use after
      `gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)`, whose backward
      reduce-scatters.

    As in Megatron-core, every rank computes the same loss: each rank's upstream gradient is that of the whole
    loss, not of a part of it.

    Args:
        hidden_TD: `[T, D]` float, equal on all ranks.
        weight_VD_shard: `[V / ranks, D]`, same dtype.
        targets_T: int `[T]`, ids in the whole vocabulary, or `IGNORE_INDEX`.
        group: the tensor-parallel group; None means that the shard is the whole vocabulary.
        temperature: divides the logits, > 0.
        vocab_size: number of ids, if the last shards are padded to equal size; padding rows are ignored and
            get a gradient of zero. None: no shard is padded.

    Returns:
        `(logprobs_T, entropy_T)`, float32 `[T]`, equal on all ranks.

    Raises:
        ValueError: as `kernels.linear_logprob`, or `vocab_size` exceeds the total size of the shards.
    """
    num_columns, vocab_offset, vocab_size = place_shard(weight_VD_shard.shape[0], vocab_size, group)
    return sharded_linear_logprob(
        hidden_TD,
        without_padding(weight_VD_shard, 0, num_columns),
        targets_T,
        temperature=temperature,
        vocab_size=vocab_size,
        vocab_offset=vocab_offset,
        reduce_statistics=statistics_reduction(group),
        reduce_hidden_gradient=_sum_reduction(group) if reduces_hidden_gradient else None,
    )


def logprobs_from_logits(
    logits_TV_shard: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    inplace_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(logprobs_T, entropy_T)` of `kernels.logprobs_from_logits`, the columns sharded over `group`.

    The gradient of a rank's logits is complete on that rank; backward communicates nothing.

    Args:
        logits_TV_shard: `[T, V / ranks]` float.
        targets_T, temperature, inplace_gradient: as in `kernels.logprobs_from_logits`.
        group, vocab_size: as in `linear_logprob`.

    Returns:
        `(logprobs_T, entropy_T)`, float32 `[T]`, equal on all ranks.

    Raises:
        ValueError: as `kernels.logprobs_from_logits`, or `vocab_size` exceeds the total size of the shards.
    """
    num_columns, vocab_offset, vocab_size = place_shard(logits_TV_shard.shape[-1], vocab_size, group)
    return sharded_logprobs_from_logits(
        without_padding(logits_TV_shard, -1, num_columns),
        targets_T,
        temperature=temperature,
        vocab_size=vocab_size,
        vocab_offset=vocab_offset,
        reduce_statistics=statistics_reduction(group),
        inplace_gradient=inplace_gradient,
    )


def statistics_reduction(
    group: dist.ProcessGroup | None,
) -> Callable[[SoftmaxStatistics], SoftmaxStatistics] | None:
    """Return the function that combines the statistics of all shards; None for one rank.

    Two collectives: MAX of `[R]`, then, relative to that maximum, SUM of `[3, R]`.
    """
    if _group_size(group) == 1:
        return None

    def reduce(local: SoftmaxStatistics) -> SoftmaxStatistics:
        if local.max_T.numel() == 0:  # the same on every rank: targets are
            return local
        max_T = local.max_T.clone()
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        sums_3T = torch.stack(local.rescaled(max_T)[1:])
        dist.all_reduce(sums_3T, op=dist.ReduceOp.SUM, group=group)
        return SoftmaxStatistics(max_T, *sums_3T.unbind(0))

    return reduce


def _sum_reduction(group: dist.ProcessGroup | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function that sums a tensor over the group in place; None for one rank."""
    if _group_size(group) == 1:
        return None

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > 0:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
        return tensor

    return reduce


def _group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def place_shard(
    shard_size: int, vocab_size: int | None, group: dist.ProcessGroup | None
) -> tuple[int, int, int]:
    """Return `(columns of this shard without padding, id of its first column, size of the vocabulary)`."""
    padded_size = shard_size * _group_size(group)
    vocab_size = padded_size if vocab_size is None else vocab_size
    if not 0 < vocab_size <= padded_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {_group_size(group)} shards of {shard_size} rows hold ids "
            f"0 ... {padded_size - 1}; pass the size before padding, at most {padded_size}"
        )
    vocab_offset = shard_size * (0 if group is None else group.rank())
    return min(shard_size, max(0, vocab_size - vocab_offset)), vocab_offset, vocab_size


def without_padding(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Return the first `size` elements along `dim`: a shard without its padding."""
    # The backward of a slice copies the whole gradient: do not slice without padding.
    return tensor if tensor.shape[dim] == size else tensor.narrow(dim, 0, size)
