"""Compute-bound kernels of the vocabulary head: a tile of logits is computed and reduced in registers.

Float32 logits are never written to memory. A tile writes four numbers per row (`_fwd_kernel`),
exp(z - maximum of the tile) in the dtype of the inputs (`_fwd_kernel` with `STORES_EXP`), or the gradient
with respect to the logits (`_bwd_kernel`). It stores exponentials relative to the tile's maximum, and not
logits, because their relative error in bf16 is 2^-8 and the most probable token is exact; a bf16 logit of 10
would be off by 0.03 and its probability by 3 %.
"""

import triton
import triton.language as tl

from glm_rlhf.kernels.lm_head.vocab_row_kernels import LN_2, LOG2_E, _at_least_lowest, _row_parameters

# Not specialised: a count of 1, or one divisible by 16, would recompile the kernel without faster code.
COUNTS = ["num_rows", "num_columns", "vocab_offset"]


@triton.jit(do_not_specialize=COUNTS)
def _linear_logprob_fwd_kernel(
    hidden,
    weight,
    targets_ptr,
    exp,
    partials_ptr,
    num_rows,
    num_columns,
    width,
    exp_stride,
    vocab_offset,
    temperature,
    USES_TMA: tl.constexpr,
    WIDTH_IS_EVEN: tl.constexpr,
    UPCASTS: tl.constexpr,
    STORES_EXP: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one tile's row maximum, sum_exp, weighted_sum, target logit: partials [4, column tiles, rows]."""
    row_tile, column_tile = _place(num_rows, num_columns, GROUP, BLOCK_T, BLOCK_V)
    first_row, first_column = row_tile * BLOCK_T, column_tile * BLOCK_V
    logits = _logits_tile(
        hidden,
        weight,
        first_row,
        first_column,
        num_rows,
        num_columns,
        width,
        USES_TMA,
        WIDTH_IS_EVEN,
        UPCASTS,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
    )
    rows = first_row + tl.arange(0, BLOCK_T)
    columns = first_column + tl.arange(0, BLOCK_V)
    targets = tl.load(targets_ptr + rows, mask=rows < num_rows, other=-1) - vocab_offset
    # Targets of the next shard may lie in this tile's columns past the last one.
    targets = tl.where(targets < num_columns, targets, -1)
    logits = tl.where((columns < num_columns)[None, :], logits, -float("inf"))  # columns past the last one
    maximum = tl.max(logits, 1)
    anchor = tl.where(maximum == -float("inf"), 0.0, maximum)
    # Subtract before scaling: scaled logits of 1e4 would be off by 1e-3.
    scale = LOG2_E / temperature
    sums = (
        tl.zeros((BLOCK_T,), tl.float32),
        tl.zeros((BLOCK_T,), tl.float32),
        tl.zeros((BLOCK_T,), tl.float32),
    )
    # A tile is reduced in parts, so that its exponentials do not need a second set of registers.
    PART_V: tl.constexpr = BLOCK_V // NUM_PARTS
    parts = _parts(logits, NUM_PARTS, BLOCK_T, BLOCK_V)
    for part in tl.static_range(NUM_PARTS):
        sums = _add_part(
            sums,
            parts[part],
            first_row,
            first_column + part * PART_V,
            targets,
            anchor,
            scale,
            exp,
            exp_stride,
            num_rows,
            num_columns,
            STORES_EXP,
            USES_TMA,
            BLOCK_T,
            PART_V,
        )
    plane = tl.cdiv(num_columns, BLOCK_V).to(tl.int64) * num_rows
    slot = partials_ptr + column_tile.to(tl.int64) * num_rows + rows
    exists = rows < num_rows
    tl.store(slot, maximum / temperature, mask=exists)
    tl.store(slot + plane, sums[0], mask=exists)
    tl.store(slot + 2 * plane, sums[1] * LN_2, mask=exists)
    tl.store(slot + 3 * plane, sums[2] / temperature, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def _linear_logprob_bwd_kernel(
    hidden,
    weight,
    targets_ptr,
    rows_ptr,
    dlogits,
    num_rows,
    num_columns,
    width,
    dlogits_stride,
    vocab_offset,
    temperature,
    USES_TMA: tl.constexpr,
    WIDTH_IS_EVEN: tl.constexpr,
    UPCASTS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Recompute a tile of logits and write its gradient; `rows_ptr` is [5, rows], see `row_parameters`.

    dz_j = dlogprob * 1[j = target] - p_j * (constant + dentropy * log p_j).
    """
    row_tile, column_tile = _place(num_rows, num_columns, GROUP, BLOCK_T, BLOCK_V)
    first_row, first_column = row_tile * BLOCK_T, column_tile * BLOCK_V
    logits = _logits_tile(
        hidden,
        weight,
        first_row,
        first_column,
        num_rows,
        num_columns,
        width,
        USES_TMA,
        WIDTH_IS_EVEN,
        UPCASTS,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
    )
    rows = first_row + tl.arange(0, BLOCK_T)
    exists = rows < num_rows
    maximum, log_sum, dlogprob, constant, dentropy = _row_parameters(rows_ptr, rows, num_rows, exists)
    targets = tl.load(targets_ptr + rows, mask=exists, other=-1) - vocab_offset
    maximum *= temperature  # back to the scale of the product
    PART_V: tl.constexpr = BLOCK_V // NUM_PARTS
    parts = _parts(logits, NUM_PARTS, BLOCK_T, BLOCK_V)
    for part in tl.static_range(NUM_PARTS):
        columns = first_column + part * PART_V + tl.arange(0, PART_V)
        shifted = (parts[part] - maximum[:, None]) * (LOG2_E / temperature)
        log2_p = _at_least_lowest(shifted - (log_sum * LOG2_E)[:, None])
        factor = constant[:, None]
        if HAS_ENTROPY:
            factor += dentropy[:, None] * (log2_p * LN_2)
        is_target = columns[None, :] == targets[:, None]
        gradient = tl.where(is_target, dlogprob[:, None], 0.0) - tl.exp2(log2_p) * factor
        if USES_TMA:
            dlogits.store([first_row, first_column + part * PART_V], gradient.to(dlogits.dtype))
        else:
            pointer = dlogits + rows.to(tl.int64)[:, None] * dlogits_stride + columns[None, :]
            mask = exists[:, None] & (columns < num_columns)[None, :]
            tl.store(pointer, gradient.to(dlogits.dtype.element_ty), mask=mask)


@triton.jit
def _place(num_rows, num_columns, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return (row tile, column tile): `GROUP` row tiles are processed together over the vocabulary.

    Tiles that run at the same time share their operands in the L2 cache, and the weight is read from memory
    once per GROUP * BLOCK_T rows.
    """
    num_row_tiles = tl.cdiv(num_rows, BLOCK_T)
    programs_per_group = GROUP * tl.cdiv(num_columns, BLOCK_V)
    group, member = tl.program_id(0) // programs_per_group, tl.program_id(0) % programs_per_group
    size = tl.minimum(num_row_tiles - group * GROUP, GROUP)
    return group * GROUP + member % size, member // size


@triton.jit
def _logits_tile(
    hidden,
    weight,
    first_row,
    first_column,
    num_rows,
    num_columns,
    width,
    USES_TMA: tl.constexpr,
    WIDTH_IS_EVEN: tl.constexpr,
    UPCASTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return hidden[rows] @ weight[columns].T in float32, before the temperature."""
    logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for first in range(0, width, BLOCK_D):
        left = _operand(hidden, first_row, first, num_rows, width, USES_TMA, WIDTH_IS_EVEN, BLOCK_T, BLOCK_D)
        right = _operand(
            weight, first_column, first, num_columns, width, USES_TMA, WIDTH_IS_EVEN, BLOCK_V, BLOCK_D
        )
        if UPCASTS:  # the interpreter's bf16 product is wrong
            left, right = left.to(tl.float32), right.to(tl.float32)
        logits = tl.dot(left, right.T, logits, input_precision="ieee")
    return logits


@triton.jit
def _operand(
    source,
    first_row,
    first_column,
    num_rows,
    width,
    USES_TMA: tl.constexpr,
    WIDTH_IS_EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return one block of a row-major matrix, given as a tensor-memory-access descriptor or as a pointer."""
    if USES_TMA:
        return source.load([first_row, first_column])
    else:
        # Rows past the last one read the last row: their results are never stored.
        rows = tl.minimum(first_row + tl.arange(0, BLOCK), num_rows - 1)
        columns = first_column + tl.arange(0, BLOCK_D)
        pointer = source + rows.to(tl.int64)[:, None] * width + columns[None, :]
        if WIDTH_IS_EVEN:
            return tl.load(pointer)
        else:
            return tl.load(pointer, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def _parts(tile, NUM_PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return the tile split by columns into a tuple of 1 or 4 parts, without moving an element."""
    if NUM_PARTS == 1:
        return (tile,)
    else:
        tl.static_assert(NUM_PARTS == 4)
        left, right = _split_in_two(tile, BLOCK_T, BLOCK_V)
        return _split_in_two(left, BLOCK_T, BLOCK_V // 2) + _split_in_two(right, BLOCK_T, BLOCK_V // 2)


@triton.jit
def _split_in_two(tile, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    return tile.reshape(BLOCK_T, 2, BLOCK_V // 2).permute(0, 2, 1).split()


@triton.jit
def _add_part(
    sums,
    logits,
    first_row,
    first_column,
    targets,
    anchor,
    scale,
    exp,
    exp_stride,
    num_rows,
    num_columns,
    STORES_EXP: tl.constexpr,
    USES_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return (sum_exp, weighted_sum in base 2, target logit) with this part of a tile added."""
    columns = first_column + tl.arange(0, BLOCK_V)
    target = sums[2] + tl.sum(tl.where(columns[None, :] == targets[:, None], logits, 0.0), 1)
    shifted = _at_least_lowest((logits - anchor[:, None]) * scale)
    part = tl.exp2(shifted)
    sum_exp = sums[0] + tl.sum(part, 1)
    weighted = sums[1] + tl.sum(part * shifted, 1)
    if STORES_EXP:
        if USES_TMA:
            exp.store([first_row, first_column], part.to(exp.dtype))
        else:
            rows = first_row + tl.arange(0, BLOCK_T)
            pointer = exp + rows.to(tl.int64)[:, None] * exp_stride + columns[None, :]
            mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
            tl.store(pointer, part.to(exp.dtype.element_ty), mask=mask)
    return sum_exp, weighted, target
