"""Sequences of different lengths as rows of one length, as transformers takes them."""

from collections.abc import Sequence

import torch


def padded(sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [B, longest]: rows filled with 0 on the right, the mask 1 where ids are."""
    longest = max(len(sequence) for sequence in sequences)
    tokens_BT = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = sequence
        mask_BT[row, : len(sequence)] = 1
    return tokens_BT, mask_BT


def padding_share(batches: Sequence[Sequence[int]]) -> float:
    """Return the share of filler in batches of sequences of these lengths, in tokens."""
    num_padded = sum(max(lengths) * len(lengths) for lengths in batches)
    return 1 - sum(map(sum, batches)) / num_padded
