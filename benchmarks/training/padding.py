"""The share of padding in a batch."""

from collections.abc import Sequence


def padding_share(batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding in batches of sequences of these lengths, in tokens."""
    num_padded = sum(max(lengths) * len(lengths) for lengths in batches)
    return 1 - sum(map(sum, batches)) / num_padded
