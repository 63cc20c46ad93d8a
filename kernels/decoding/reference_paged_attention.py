"""Attention over a paged key/value pool in plain torch, vectorised over the batch."""

import torch
import torch.nn.functional as F


def paged_attention(
    query_BQNH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    page_table_BP: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Return the attention of the newest Q tokens of every sequence over its pages, [B, Q, N, H].

    The pages are gathered into [B, longest context] and masked. Computed in fp32 (float64 for float64).
    """
    num_new = query_BQNH.shape[1]
    slots_BL, bias_BQL = visible_slots(page_table_BP, lengths_B, page_size=key_pool.shape[1], num_new=num_new)
    out_BQNH = attend(query_BQNH, key_pool, value_pool, slots_BL, bias_BQL, scale=scale)
    if int(lengths_B.min()) < num_new:
        # A token before the start of the sequence sees no key: its softmax is 0 / 0, its output is set to 0.
        new = torch.arange(num_new, device=lengths_B.device)
        out_BQNH.masked_fill_((lengths_B[:, None] + new < num_new)[:, :, None, None], 0.0)
    return out_BQNH


def visible_slots(
    page_table_BP: torch.Tensor, lengths_B: torch.Tensor, *, page_size: int, num_new: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (slots_BL, bias_BQL): the pool slot of each context position, and its score bias, 0 or −∞.

    L is the longest length. Both are the same for all layers, so one call is enough for a decode step.
    Positions past the end of a sequence repeat its first slot: the pool is never read beyond the end.
    """
    longest = int(lengths_B.max())
    num_pages = -(-longest // page_size)
    positions_L = torch.arange(longest, dtype=torch.int32, device=lengths_B.device)
    is_within_BL = positions_L < lengths_B[:, None]
    first_slots_BP1 = page_table_BP[:, :num_pages, None].long() * page_size
    offsets = torch.arange(page_size, device=lengths_B.device)
    slots_BL = (first_slots_BP1 + offsets).view(len(lengths_B), -1)[:, :longest]
    # An empty sequence may have no valid page; slot 0 always exists, and its rows are set to 0 at the end.
    first_B1 = torch.where(is_within_BL[:, :1], slots_BL[:, :1], 0)
    slots_BL = torch.where(is_within_BL, slots_BL, first_B1)
    if num_new == 1:
        is_visible_BQL = is_within_BL[:, None]
    else:
        new_Q = torch.arange(num_new, dtype=torch.int32, device=lengths_B.device)
        num_visible_BQ = lengths_B[:, None] - (num_new - 1 - new_Q)
        is_visible_BQL = positions_L < num_visible_BQ[:, :, None]
    bias_BQL = torch.where(is_visible_BQL, 0.0, -torch.inf)
    return slots_BL, bias_BQL


def attend(
    query_BQNH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots_BL: torch.Tensor,
    bias_BQL: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Return softmax(scale · q k + bias) v over the gathered slots, [B, Q, N, H] in query's dtype."""
    batch, num_new, num_heads, head_size = query_BQNH.shape
    num_kv_heads, longest = key_pool.shape[2], slots_BL.shape[1]
    group = num_heads // num_kv_heads
    dtype = torch.float64 if query_BQNH.dtype == torch.float64 else torch.float32

    def gather(pool: torch.Tensor) -> torch.Tensor:
        rows = pool.view(-1, num_kv_heads * head_size).index_select(0, slots_BL.reshape(-1))
        return rows.view(batch, longest, num_kv_heads, head_size).transpose(1, 2).to(dtype)

    # Query heads of one group are rows next to the new tokens, so that keys are not repeated.
    query_BKMH = query_BQNH.view(batch, num_new, num_kv_heads, group, head_size).transpose(1, 2)
    query_BKMH = query_BKMH.reshape(batch, num_kv_heads, num_new * group, head_size).to(dtype)
    bias_BM = bias_BQL.to(dtype).repeat_interleave(group, dim=1) if num_new > 1 else bias_BQL.to(dtype)
    out_BKMH = F.scaled_dot_product_attention(
        query_BKMH, gather(key_pool), gather(value_pool), attn_mask=bias_BM[:, None], scale=scale
    )
    out_BKQGH = out_BKMH.reshape(batch, num_kv_heads, num_new, group, head_size)
    return out_BKQGH.transpose(1, 2).reshape(query_BQNH.shape).to(query_BQNH.dtype)
