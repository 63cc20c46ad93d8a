"""Selection of the rows of a packed batch that have a target or a gradient; other rows are not computed."""

import torch

IGNORE_INDEX = -100
"""Target of a row to skip: logprob and entropy 0, gradient exactly zero."""


def rows_with_target(targets_T: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """Return the indices of the rows whose target is not `IGNORE_INDEX`; None means every row.

    On CUDA one transfer of three numbers to the host: the count, on which all later shapes depend, and the
    range of the targets.

    Args:
        targets_T: int64 or int32 `[T]`, token ids or `IGNORE_INDEX`.
        vocab_size: number of ids in the whole vocabulary (not of one shard).

    Returns:
        int64 `[number of rows with a target]`, ascending, or None.

    Raises:
        ValueError: a target is neither `IGNORE_INDEX` nor in `[0, vocab_size)`.
    """
    if targets_T.numel() == 0:
        return None
    has_target_T = targets_T != IGNORE_INDEX
    in_range_T = torch.where(has_target_T, targets_T, 0)
    count, low, high = torch.stack([has_target_T.sum(), in_range_T.min(), in_range_T.max()]).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets: found {low if low < 0 else high}, required 0 <= target < {vocab_size} "
            f"(the vocabulary) or {IGNORE_INDEX} (skip the row); check that the tokenizer is the model's"
        )
    if count == targets_T.numel():
        return None
    return torch.nonzero_static(has_target_T, size=count).squeeze(1)


def rows_with_gradient(*gradients: torch.Tensor | None) -> torch.Tensor | None:
    """Return the indices of the rows where any gradient is not exactly zero; None means every row.

    Rows with NaN are included, so that the NaN is propagated. On CUDA the host waits for the count.

    Args:
        gradients: `[T]` each; None is zero everywhere, not all may be None.
    """
    nonzero = [gradient_T != 0 for gradient_T in gradients if gradient_T is not None]
    is_live_T = torch.stack(nonzero).any(dim=0)
    rows = is_live_T.nonzero().squeeze(1)
    return None if rows.shape[0] == is_live_T.shape[0] else rows
