"""Writing new keys and values into a paged pool."""

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.decoding import reference_paged_write as reference
from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.dispatch.launch import CompileCase

# Elements of one tile: at 2 heads of 128 these are 8 tokens, 16 elements per thread of each tensor.
_TILE_ELEMENTS = 2048


@torch.no_grad()
def paged_write(
    key_TKH: torch.Tensor,
    value_TKH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Store row t of key and value in row slots[t] of the pools viewed as [pages · page_size, K, H].

    slot = page · page_size + offset; a slot of −1 writes nothing. Slots must be distinct.

    Args:
        key_TKH: [T, K, H]; only heads must be contiguous, so that a view of packed QKV is allowed.
        value_TKH: [T, K, H].
        key_pool: [pages, page_size, K, H], contiguous, key's dtype; overwritten.
        value_pool: like key_pool.
        slots_T: int64 [T], each −1 or within the pool; checked on CPU only: on CUDA the host would wait for
            the device.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    _check(key_TKH, value_TKH, key_pool, value_pool, slots_T)
    if not launch.uses_triton(key_pool):
        reference.paged_write(key_TKH, value_TKH, key_pool, value_pool, slots_T)
        return
    num_tokens, num_kv_heads, head_size = key_TKH.shape
    if key_TKH.numel() == 0:
        return
    block_K, block_H = triton.next_power_of_2(num_kv_heads), triton.next_power_of_2(head_size)
    block_T = max(1, _TILE_ELEMENTS // (block_K * block_H))
    _paged_write_kernel[(triton.cdiv(num_tokens, block_T),)](
        key_TKH,
        value_TKH,
        key_pool,
        value_pool,
        slots_T,
        num_tokens,
        key_TKH.stride(0),
        key_TKH.stride(1),
        value_TKH.stride(0),
        value_TKH.stride(1),
        K=num_kv_heads,
        H=head_size,
        BLOCK_T=block_T,
        BLOCK_K=block_K,
        BLOCK_H=block_H,
        num_warps=4,
    )


def _check(
    key_TKH: torch.Tensor,
    value_TKH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    if key_TKH.ndim != 3 or key_TKH.shape != value_TKH.shape or key_pool.shape != value_pool.shape:
        raise ValueError(
            f"key is {tuple(key_TKH.shape)}, value {tuple(value_TKH.shape)}, pools {tuple(key_pool.shape)} "
            f"and {tuple(value_pool.shape)}: key and value must be [T, K, H], the pools of one shape"
        )
    if key_pool.ndim != 4 or key_pool.shape[2:] != key_TKH.shape[1:]:
        raise ValueError(
            f"the pools are {tuple(key_pool.shape)}, key is {tuple(key_TKH.shape)}: "
            "the pools must be [pages, page_size, K, H] with key's K and H"
        )
    if slots_T.shape != key_TKH.shape[:1] or slots_T.dtype != torch.int64:
        raise ValueError(
            f"slots are {tuple(slots_T.shape)} {slots_T.dtype}, required is int64 [{key_TKH.shape[0]}]"
        )
    if not key_TKH.dtype == value_TKH.dtype == key_pool.dtype == value_pool.dtype:
        raise ValueError(f"key is {key_TKH.dtype}, the pool {key_pool.dtype}: use one dtype")
    if not (key_pool.is_contiguous() and value_pool.is_contiguous()):
        raise ValueError("the key and value pools must be contiguous: pass the pools, not slices of them")
    if key_TKH.stride(2) != 1 or value_TKH.stride(2) != 1:
        raise ValueError("the elements of a key or value head must be contiguous")


@triton.jit
def _paged_write_kernel(
    key_ptr,
    value_ptr,
    key_pool_ptr,
    value_pool_ptr,
    slots_ptr,
    num_tokens,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    heads = tl.arange(0, BLOCK_K)
    elements = tl.arange(0, BLOCK_H)
    slots = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
    mask = (slots >= 0)[:, None, None] & ((heads < K)[:, None] & (elements < H)[None, :])[None, :, :]
    pool_offsets = (slots[:, None, None] * K + heads[None, :, None]) * H + elements[None, None, :]
    key_offsets = tokens[:, None, None] * key_token_stride + heads[None, :, None] * key_head_stride
    value_offsets = tokens[:, None, None] * value_token_stride + heads[None, :, None] * value_head_stride
    key = tl.load(key_ptr + key_offsets + elements[None, None, :], mask=mask)
    value = tl.load(value_ptr + value_offsets + elements[None, None, :], mask=mask)
    tl.store(key_pool_ptr + pool_offsets, key, mask=mask)
    tl.store(value_pool_ptr + pool_offsets, value, mask=mask)


def compile_cases() -> list[CompileCase]:
    """Return the write of 2 key/value heads of 128 (6B and 9B) from packed QKV, in bf16."""
    constexprs = {"K": 2, "H": 128, "BLOCK_T": _TILE_ELEMENTS // 256, "BLOCK_K": 2, "BLOCK_H": 128}
    pointers = dict.fromkeys(("key_ptr", "value_ptr", "key_pool_ptr", "value_pool_ptr"), "*bf16")
    strides = ("key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride")
    signature = pointers | {"slots_ptr": "*i64", "num_tokens": "i32"} | dict.fromkeys(strides, "i32")
    return [
        CompileCase(
            name="paged_write/6B/bf16",
            kernel=_paged_write_kernel,
            signature=signature | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            divisible_by_16=(*pointers, "slots_ptr", *strides),
            num_warps=4,
        )
    ]
