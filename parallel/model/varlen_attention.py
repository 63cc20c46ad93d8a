"""Causal attention over packed sequences, by the fastest available implementation.

For bf16 and fp16 on CUDA: Transformer Engine if installed, else torch's variable-length flash attention.
Otherwise: scaled-dot-product attention per sequence.
"""

import functools
import inspect
import math
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from glm_rlhf.parallel.model.packing import Segment

CoreAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segment], torch.Tensor]


def packed_attention(
    query_TNH: torch.Tensor, key_SKH: torch.Tensor, value_SKH: torch.Tensor, segments: tuple[Segment, ...]
) -> torch.Tensor:
    """Return softmax(q kᵀ / √H) v per sequence: causal attention with grouped query heads.

    Within a sequence of n queries and m ≥ n keys, query i sees keys 0 … m - n + i.

    Args:
        query_TNH: queries of this rank's rows.
        key_SKH: keys of the whole stream; N is a multiple of K.
        value_SKH: values of the whole stream.
        segments: the keys that each range of queries attends to, `ContextShard.segments`.

    Returns:
        [T, N, H] in the dtype of the queries.
    """
    attend = _implementation(query_TNH.device.type, query_TNH.dtype)
    parts = [
        attend(
            query_TNH[segment.query_start : segment.query_end],
            key_SKH[segment.key_start : segment.key_end],
            value_SKH[segment.key_start : segment.key_end],
            segment,
        )
        for segment in segments
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def implementation_name(device_type: str, dtype: torch.dtype) -> str:
    """Return the name of the implementation that `packed_attention` uses for such tensors."""
    return _implementation(device_type, dtype).__name__.lstrip("_")


@functools.cache
def _implementation(device_type: str, dtype: torch.dtype) -> CoreAttention:
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return _scaled_dot_product
    if _transformer_engine_attention() is not None:
        return _transformer_engine
    return _scaled_dot_product if _varlen_attention() is None else _torch_varlen


def _scaled_dot_product(
    query_TNH: torch.Tensor, key_SKH: torch.Tensor, value_SKH: torch.Tensor, segment: Segment
) -> torch.Tensor:
    """One call per sequence: exact for any length, no padding."""
    queries = query_TNH.transpose(0, 1).unsqueeze(0).split(segment.query_lengths, dim=2)
    keys = key_SKH.transpose(0, 1).unsqueeze(0).split(segment.key_lengths, dim=2)
    values = value_SKH.transpose(0, 1).unsqueeze(0).split(segment.key_lengths, dim=2)
    outputs = []
    for query, key, value in zip(queries, keys, values, strict=True):
        num_queries, num_keys = query.shape[2], key.shape[2]
        mask = None
        if num_queries < num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(num_keys - num_queries)
        outputs.append(
            scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _torch_varlen(
    query_TNH: torch.Tensor, key_SKH: torch.Tensor, value_SKH: torch.Tensor, segment: Segment
) -> torch.Tensor:
    return _varlen_attention()(
        query_TNH,
        key_SKH,
        value_SKH,
        segment.query_cu_seqlens,
        segment.key_cu_seqlens,
        max(segment.query_lengths),
        max(segment.key_lengths),
    )


@functools.cache
def _varlen_attention() -> Callable[..., torch.Tensor] | None:
    """Return torch's causal variable-length attention with grouped heads, or None if torch lacks it.

    torch 2.10 has the argument `is_causal`, later versions `window_size`; later versions also need
    `enable_gqa`, where 2.10 always groups heads.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    options: dict = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


def _transformer_engine(
    query_TNH: torch.Tensor, key_SKH: torch.Tensor, value_SKH: torch.Tensor, segment: Segment
) -> torch.Tensor:
    num_heads, head_size = query_TNH.shape[1:]
    attention = _transformer_engine_module(num_heads, key_SKH.shape[1], head_size)
    output = attention(
        query_TNH.contiguous(),
        key_SKH.contiguous(),
        value_SKH.contiguous(),
        qkv_format="thd",
        cu_seqlens_q=segment.query_cu_seqlens,
        cu_seqlens_kv=segment.key_cu_seqlens,
        max_seqlen_q=max(segment.query_lengths),
        max_seqlen_kv=max(segment.key_lengths),
        attn_mask_type="padding_causal_bottom_right",
    )
    return output.view(-1, num_heads, head_size)


@functools.cache
def _transformer_engine_attention() -> type | None:
    try:
        from transformer_engine.pytorch import DotProductAttention
    except (ImportError, OSError):
        return None
    return DotProductAttention


@functools.cache
def _transformer_engine_module(num_heads: int, num_kv_heads: int, head_size: int) -> torch.nn.Module:
    return _transformer_engine_attention()(
        num_heads,
        head_size,
        num_gqa_groups=num_kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        softmax_scale=1.0 / math.sqrt(head_size),
    )
