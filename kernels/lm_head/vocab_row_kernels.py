"""Memory-bound kernels of the vocabulary head: merge of tile statistics, gradient from exponentials."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Its exp2 is 0; 0 times it is 0, whereas 0 times -inf is NaN.
LOWEST_EXPONENT = tl.constexpr(-1.0e4)
# Replaces an underflown exponential in a logarithm, which is then finite; its factor is 0.
SMALLEST_EXP = tl.constexpr(1.0e-37)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "vocab_offset"])
def _dlogits_from_exp_kernel(
    exp_ptr,
    tile_maxima_ptr,
    sources_ptr,
    targets_ptr,
    rows_ptr,
    num_rows,
    num_columns,
    exp_stride,
    vocab_offset,
    HAS_ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Overwrite row `slot` of exp with the gradient of row `sources[slot]`; tile_maxima is [tiles, rows].

    A slot is its own source, or a row without a gradient whose source is a live row after the last slot: no
    program reads what another one writes.
    """
    slot = tl.program_id(0).to(tl.int64)
    source = tl.load(sources_ptr + slot)
    tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tiles[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    tile_maximum = tl.load(
        tile_maxima_ptr + tiles.to(tl.int64) * num_rows + source,
        mask=tiles * BLOCK_V < num_columns,
        other=0.0,
    )
    maximum, log_sum, dlogprob, constant, dentropy = _row_parameters(rows_ptr, source, num_rows, True)
    target = tl.load(targets_ptr + source) - vocab_offset
    exists = columns < num_columns
    exp = tl.load(exp_ptr + source * exp_stride + columns, mask=exists, other=0.0).to(tl.float32)
    # A tile of -inf only has exp 0 everywhere; its shift must not be -inf.
    shift = _at_least_lowest((tile_maximum - maximum) - log_sum)[:, None]
    probability = exp * tl.exp2(shift * LOG2_E)
    logp = shift
    if HAS_ENTROPY:
        logp = tl.log2(tl.maximum(exp, SMALLEST_EXP)) * LN_2 + shift
    factor = constant
    if HAS_ENTROPY:
        factor = constant + dentropy * logp
    gradient = tl.where(columns == target, dlogprob, 0.0) - probability * factor
    tl.store(exp_ptr + slot * exp_stride + columns, gradient.to(exp_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _merge_partials_kernel(
    partials_ptr, out_ptr, num_tiles, num_rows, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Merge partials [4, tiles, rows] over the tiles, in order, into out [4, rows]."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = rows < num_rows
    plane = num_tiles.to(tl.int64) * num_rows
    maximum = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    target = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, num_tiles, BLOCK_S):
        tiles = first + tl.arange(0, BLOCK_S)
        pointer = partials_ptr + tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        exists = (tiles < num_tiles)[:, None] & is_row[None, :]
        tile_maximum = tl.load(pointer, mask=exists, other=-float("inf"))
        tile_sum = tl.load(pointer + plane, mask=exists, other=0.0)
        tile_weighted = tl.load(pointer + 2 * plane, mask=exists, other=0.0)
        target += tl.sum(tl.load(pointer + 3 * plane, mask=exists, other=0.0), 0)
        new_maximum = tl.maximum(maximum, tl.max(tile_maximum, 0))
        anchor = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        old_shift = _at_least_lowest(maximum - anchor)
        tile_shift = _at_least_lowest(tile_maximum - anchor[None, :])
        old_scale = tl.exp2(old_shift * LOG2_E)
        tile_scale = tl.exp2(tile_shift * LOG2_E)
        weighted = (weighted + old_shift * sum_exp) * old_scale
        weighted += tl.sum((tile_weighted + tile_shift * tile_sum) * tile_scale, 0)
        sum_exp = sum_exp * old_scale + tl.sum(tile_sum * tile_scale, 0)
        maximum = new_maximum
    tl.store(out_ptr + rows, maximum, mask=is_row)
    tl.store(out_ptr + num_rows + rows, sum_exp, mask=is_row)
    tl.store(out_ptr + 2 * num_rows + rows, weighted, mask=is_row)
    tl.store(out_ptr + 3 * num_rows + rows, target, mask=is_row)


@triton.jit
def _at_least_lowest(exponent):
    """Return the exponent with -inf replaced by the lowest one; NaN is propagated."""
    return tl.maximum(exponent, LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_parameters(rows_ptr, rows, num_rows, exists):
    """Return the five planes of `row_parameters` for some rows, 0 where `exists` is false."""
    maximum = tl.load(rows_ptr + rows, mask=exists, other=0.0)
    log_sum = tl.load(rows_ptr + num_rows + rows, mask=exists, other=0.0)
    dlogprob = tl.load(rows_ptr + 2 * num_rows + rows, mask=exists, other=0.0)
    constant = tl.load(rows_ptr + 3 * num_rows + rows, mask=exists, other=0.0)
    dentropy = tl.load(rows_ptr + 4 * num_rows + rows, mask=exists, other=0.0)
    return maximum, log_sum, dlogprob, constant, dentropy
