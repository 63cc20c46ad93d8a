"""How much of a batch of padded sequences is filler."""

from collections.abc import Sequence


def padding_share(batches: Sequence[Sequence[int]]) -> float:
    """Return the share of filler in batches of sequences of these lengths, in tokens."""
    num_padded = sum(max(lengths) * len(lengths) for lengths in batches)
    return 1 - sum(map(sum, batches)) / num_padded
