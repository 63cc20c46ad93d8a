"""Writing new keys and values into a paged pool in plain torch."""

import torch


def paged_write(
    key_TKH: torch.Tensor,
    value_TKH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Copy row t of key and value to row slots[t] of the pools as [pages · page_size, K, H]; skip slot −1."""
    is_written_T = slots_T >= 0
    if not bool(is_written_T.all()):
        key_TKH, value_TKH, slots_T = key_TKH[is_written_T], value_TKH[is_written_T], slots_T[is_written_T]
    key_pool.view(-1, *key_pool.shape[2:]).index_copy_(0, slots_T, key_TKH)
    value_pool.view(-1, *value_pool.shape[2:]).index_copy_(0, slots_T, value_TKH)
