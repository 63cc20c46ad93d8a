"""Attention of newly decoded tokens over a paged key/value pool."""

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.decoding import reference_paged_attention as reference
from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.dispatch.launch import CompileCase

# Keys per program. A constant, not a function of the batch, so that a sequence's output is bitwise equal in
# every batch. 512 keys of 128 bf16 elements are 256 KB read per 8 KB of partial result written; at batch 1 a
# context of 8192 still has 16 programs per key/value head.
_KEYS_PER_SPLIT = 512
# Bytes of the keys of one tile: 64 keys of 128 bf16 elements; their values take the same.
_TILE_BYTES = 16384
# Triton halves the stages between the page numbers and the keys that need them: five keep two tiles of keys
# and values in flight. 72 KB per block, three blocks in an H100's 227 KB of shared memory.
_NUM_STAGES = 5
# Query rows (new tokens × heads of a group) of one program. 16 fill one m16n8k16 instruction.
_MIN_BLOCK_ROWS = 16
_MAX_BLOCK_ROWS = 64
# Splits that the combination reads at once. A constant for the same reason as _KEYS_PER_SPLIT.
_BLOCK_SPLITS = 16


@torch.no_grad()
def paged_attention(
    query_BNH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    page_table_BP: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the attention output of every sequence's newest tokens over its own pages.

    With L = lengths[b], new token j of Q (0 ≤ j < Q) has position L − Q + j and attends to the positions
    s ≤ L − Q + j, whose keys are key_pool[page_table[b, s // page_size], s % page_size]:
    out[b, j, n] = Σ_s softmax_s(scale · query[b, j, n] · key[s, n // group]) · value[s, n // group],
    group = N / K

    The new tokens' own keys and values must already be in the pool (`paged_write`). Memory beyond a
    sequence's length is never read. The kernel's result depends bitwise only on the row's own sequence, not
    on the batch or the width of the page table. Not differentiable.

    Args:
        query_BNH: [B, N, H] for one new token each, or [B, Q, N, H]; fp32, bf16 or fp16 (fp64 on CPU).
        key_pool: [pages, page_size, K, H], contiguous, query's dtype; N a multiple of K.
        value_pool: like key_pool.
        page_table_BP: int32 [B, P], page of each run of page_size positions; entries past the length are
            ignored.
        lengths_B: int32 [B], positions in the pool per sequence, including the new ones, ≤ P · page_size.
        scale: factor of the scores, H^-0.5 by default.

    Returns:
        Query's shape and dtype. Softmax and sums are fp32. Rows without a visible position (length 0) are 0.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.

    Source: Dao et al., "Flash-Decoding for long-context inference" (2023); Kwon et al., "PagedAttention"
    (2023). Here the split is by a fixed number of keys.
    """
    _check(query_BNH, key_pool, value_pool, page_table_BP, lengths_B)
    scale = query_BNH.shape[-1] ** -0.5 if scale is None else scale
    query_BQNH = query_BNH if query_BNH.ndim == 4 else query_BNH[:, None]
    if query_BNH.numel() == 0 or page_table_BP.shape[1] == 0:
        return torch.zeros_like(query_BNH)
    run = _launch if launch.uses_triton(query_BNH) else reference.paged_attention
    return run(query_BQNH, key_pool, value_pool, page_table_BP, lengths_B, scale=scale).view(query_BNH.shape)


def _launch(
    query_BQNH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    page_table_BP: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    if query_BQNH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernel computes in fp32, query is {query_BQNH.dtype}: pass fp32, bf16 or fp16")
    batch, num_new, num_heads, head_size = query_BQNH.shape
    page_size, num_kv_heads = key_pool.shape[1:3]
    num_rows = num_new * (num_heads // num_kv_heads)
    num_splits = triton.cdiv(page_table_BP.shape[1] * page_size, _KEYS_PER_SPLIT)
    constexprs = _constexprs(query_BQNH.shape, key_pool, is_single=num_splits == 1)
    query_BQNH = query_BQNH.contiguous()
    out_BQNH = torch.empty_like(query_BQNH)
    # Unused, and of size 0, if one split holds the whole context.
    partial_shape = (batch, num_splits, num_kv_heads, num_rows) if num_splits > 1 else (0,)
    partial_out = torch.empty(*partial_shape, head_size, dtype=torch.float32, device=query_BQNH.device)
    partial_max = torch.empty(partial_shape, dtype=torch.float32, device=query_BQNH.device)
    partial_sum = torch.empty_like(partial_max)
    num_row_blocks = triton.cdiv(num_rows, constexprs["BLOCK_M"])
    _paged_attention_fwd_kernel[(num_splits, num_kv_heads * num_row_blocks, batch)](
        query_BQNH,
        key_pool,
        value_pool,
        page_table_BP,
        lengths_B,
        out_BQNH,
        partial_out,
        partial_max,
        partial_sum,
        scale * 1.4426950408889634,  # log2(e): the kernel's exponentials are powers of two
        page_table_BP.stride(0),
        num_splits,
        **constexprs,
        IS_INTERPRETED=launch.is_interpreting(),
        num_warps=4,
        num_stages=_NUM_STAGES,
    )
    if num_splits > 1:
        _paged_attention_combine_kernel[(num_kv_heads * num_rows, batch)](
            partial_out,
            partial_max,
            partial_sum,
            lengths_B,
            out_BQNH,
            num_splits,
            **{name: constexprs[name] for name in ("Q", "GROUP", "K", "H", "BLOCK_H", "SPLIT")},
            BLOCK_S=_BLOCK_SPLITS,
            num_warps=4,
        )
    return out_BQNH


def _constexprs(
    query_shape: tuple[int, ...], key_pool: torch.Tensor, *, is_single: bool
) -> dict[str, int | bool]:
    _, num_new, num_heads, head_size = query_shape
    page_size, num_kv_heads = key_pool.shape[1:3]
    group = num_heads // num_kv_heads
    block_M = min(_MAX_BLOCK_ROWS, max(_MIN_BLOCK_ROWS, triton.next_power_of_2(num_new * group)))
    block_H = max(16, triton.next_power_of_2(head_size))
    return {
        "Q": num_new,
        "GROUP": group,
        "K": num_kv_heads,
        "H": head_size,
        "PAGE": page_size,
        "SPLIT": _KEYS_PER_SPLIT,
        "BLOCK_M": block_M,
        "BLOCK_N": max(16, min(64, _TILE_BYTES // (block_H * key_pool.element_size()))),
        "BLOCK_H": block_H,
        "IS_SINGLE": is_single,
    }


def _check(
    query_BNH: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    page_table_BP: torch.Tensor,
    lengths_B: torch.Tensor,
) -> None:
    if query_BNH.ndim not in (3, 4) or key_pool.ndim != 4 or key_pool.shape != value_pool.shape:
        raise ValueError(
            f"query is {tuple(query_BNH.shape)}, pools {tuple(key_pool.shape)}, {tuple(value_pool.shape)}; "
            "required are a query [B, N, H] or [B, Q, N, H] and pools [pages, page_size, K, H]"
        )
    num_heads, head_size = query_BNH.shape[-2:]
    if head_size != key_pool.shape[3] or num_heads % key_pool.shape[2]:
        raise ValueError(
            f"{num_heads} query heads of {head_size} elements do not fit {key_pool.shape[2]} key heads of "
            f"{key_pool.shape[3]}: sizes must be equal, query heads a multiple of key heads"
        )
    if not query_BNH.dtype == key_pool.dtype == value_pool.dtype:
        raise ValueError(
            f"query is {query_BNH.dtype}, the pools {key_pool.dtype} and {value_pool.dtype}: use one dtype"
        )
    if not (key_pool.is_contiguous() and value_pool.is_contiguous()):
        raise ValueError("the key and value pools must be contiguous: pass the pools, not slices of them")
    batch = query_BNH.shape[0]
    if page_table_BP.ndim != 2 or page_table_BP.shape[0] != batch or lengths_B.shape != (batch,):
        raise ValueError(
            f"page table is {tuple(page_table_BP.shape)}, lengths {tuple(lengths_B.shape)}: "
            f"a batch of {batch} needs [{batch}, P] and [{batch}]"
        )
    if page_table_BP.dtype != torch.int32 or lengths_B.dtype != torch.int32 or page_table_BP.stride(1) != 1:
        raise ValueError(
            f"page table is {page_table_BP.dtype} with strides {page_table_BP.stride()}, lengths "
            f"{lengths_B.dtype}: both must be int32, the table's rows contiguous"
        )


@triton.jit
def _paged_attention_fwd_kernel(
    query_ptr,
    key_pool_ptr,
    value_pool_ptr,
    page_table_ptr,
    lengths_ptr,
    out_ptr,
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    scale_log2,
    table_stride,
    num_splits,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1) % K
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + sequence)
    first_key = split * SPLIT
    if not IS_SINGLE:
        if first_key >= length:
            return
    end_key = tl.minimum(first_key + SPLIT, length)

    rows = tl.program_id(1) // K * BLOCK_M + tl.arange(0, BLOCK_M)
    new = rows // GROUP
    elements = tl.arange(0, BLOCK_H)
    is_row = rows < Q * GROUP
    row_mask = is_row[:, None] & (elements < H)[None, :]
    # Rows of [B, Q, N, H] viewed as [B · Q · N, H]: the heads of this program's group.
    query_rows = (sequence * Q + new) * (K * GROUP) + kv_head * GROUP + rows % GROUP
    query_offsets = query_rows[:, None] * H + elements[None, :]
    query = tl.load(query_ptr + query_offsets, mask=row_mask, other=0.0)
    num_visible = length - Q + new + 1

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = keys < end_key
        pages = tl.load(page_table_ptr + sequence * table_stride + keys // PAGE, mask=is_key, other=0)
        slots = pages.to(tl.int64) * PAGE + keys % PAGE
        pool_offsets = (slots * K + kv_head)[:, None] * H + elements[None, :]
        key_mask = is_key[:, None] & (elements < H)[None, :]
        key = tl.load(key_pool_ptr + pool_offsets, mask=key_mask, other=0.0)
        value = tl.load(value_pool_ptr + pool_offsets, mask=key_mask, other=0.0)
        if IS_INTERPRETED:  # the interpreter's bf16 products are wrong
            scores = tl.dot(query.to(tl.float32), tl.trans(key).to(tl.float32))
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(keys[None, :] < num_visible[:, None], scores * scale_log2, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        # A row without a key so far has maximum −∞; −∞ − (−∞) would be NaN.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - finite_max[:, None])
        decay = tl.exp2(running_max - finite_max)
        running_sum = running_sum * decay + tl.sum(weights, axis=1)
        running_max = new_max
        if IS_INTERPRETED:
            out = out * decay[:, None] + tl.dot(weights, value.to(tl.float32))
        else:
            out = tl.dot(weights.to(value.dtype), value, out * decay[:, None], input_precision="ieee")

    if IS_SINGLE:
        out = out / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
        tl.store(out_ptr + query_offsets, out.to(out_ptr.dtype.element_ty), mask=row_mask)
    else:
        partial_rows = ((sequence * num_splits + split) * K + kv_head) * (Q * GROUP) + rows
        tl.store(partial_out_ptr + partial_rows[:, None] * H + elements[None, :], out, mask=row_mask)
        tl.store(partial_max_ptr + partial_rows, running_max, mask=is_row)
        tl.store(partial_sum_ptr + partial_rows, running_sum, mask=is_row)


@triton.jit
def _paged_attention_combine_kernel(
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    lengths_ptr,
    out_ptr,
    num_splits,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    kv_head = tl.program_id(0) // (Q * GROUP)
    row = tl.program_id(0) % (Q * GROUP)
    sequence = tl.program_id(1).to(tl.int64)
    # Splits beyond the length have written nothing and must not be read.
    num_active = tl.cdiv(tl.load(lengths_ptr + sequence), SPLIT)
    elements = tl.arange(0, BLOCK_H)
    is_element = elements < H

    running_max = tl.max(tl.full([BLOCK_S], float("-inf"), tl.float32))
    running_sum = 0.0
    out = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, num_active, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        is_active = splits < num_active
        partial_rows = ((sequence * num_splits + splits) * K + kv_head) * (Q * GROUP) + row
        maxima = tl.load(partial_max_ptr + partial_rows, mask=is_active, other=float("-inf"))
        sums = tl.load(partial_sum_ptr + partial_rows, mask=is_active, other=0.0)
        mask = is_active[:, None] & is_element[None, :]
        partial_offsets = partial_rows[:, None] * H + elements[None, :]
        partial_out = tl.load(partial_out_ptr + partial_offsets, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(maxima))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(maxima - finite_max)
        decay = tl.exp2(running_max - finite_max)
        running_sum = running_sum * decay + tl.sum(weights * sums)
        out = out * decay + tl.sum(weights[:, None] * partial_out, axis=0)
        running_max = new_max

    out = out / tl.where(running_sum == 0.0, 1.0, running_sum)
    out_row = (sequence * Q + row // GROUP) * (K * GROUP) + kv_head * GROUP + row % GROUP
    tl.store(out_ptr + out_row * H + elements, out.to(out_ptr.dtype.element_ty), mask=is_element)


def compile_cases() -> list[CompileCase]:
    """Return decode with 6B/9B heads (32 query, 2 key/value of 128) in bf16, one and four new tokens."""
    cases = []
    pointers = dict.fromkeys(("query_ptr", "key_pool_ptr", "value_pool_ptr"), "*bf16")
    pointers |= {"page_table_ptr": "*i32", "lengths_ptr": "*i32", "out_ptr": "*bf16"}
    partials = dict.fromkeys(("partial_out_ptr", "partial_max_ptr", "partial_sum_ptr"), "*fp32")
    scalars = {"scale_log2": "fp32", "table_stride": "i32", "num_splits": "i32"}
    for num_new, page_size, is_single in ((1, 16, False), (1, 64, True), (4, 64, False)):
        pool = torch.empty(1, page_size, 2, 128, dtype=torch.bfloat16, device="meta")
        constexprs = _constexprs((1, num_new, 32, 128), pool, is_single=is_single)
        constexprs |= {"IS_INTERPRETED": False}
        cases.append(
            CompileCase(
                name=f"paged_attention_fwd/6B-new{num_new}-page{page_size}/bf16",
                kernel=_paged_attention_fwd_kernel,
                signature=pointers | partials | scalars | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible_by_16=(*pointers, *partials),
                num_warps=4,
                num_stages=_NUM_STAGES,
            )
        )
    constexprs = {"Q": 1, "GROUP": 16, "K": 2, "H": 128, "BLOCK_H": 128, "SPLIT": _KEYS_PER_SPLIT}
    constexprs |= {"BLOCK_S": _BLOCK_SPLITS}
    combine = partials | {"lengths_ptr": "*i32", "out_ptr": "*bf16"}
    cases.append(
        CompileCase(
            name="paged_attention_combine/6B/bf16",
            kernel=_paged_attention_combine_kernel,
            signature=combine | {"num_splits": "i32"} | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            divisible_by_16=tuple(combine),
            num_warps=4,
        )
    )
    return cases
