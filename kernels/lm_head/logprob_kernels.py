"""Kernels that reduce rows of existing logits and write their gradient."""

import triton
import triton.language as tl

from glm_rlhf.kernels.lm_head.vocab_row_kernels import LN_2, LOG2_E, _at_least_lowest


@triton.jit(do_not_specialize=["num_rows", "num_columns", "vocab_size", "vocab_offset"])
def _logprob_fwd_kernel(
    logits_ptr,
    targets_ptr,
    out_ptr,
    num_rows,
    num_columns,
    stride,
    vocab_size,
    vocab_offset,
    temperature,
    IGNORE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. out [5, rows]: logprob, entropy, max, log_sum, entropy (IS_WHOLE) or statistics.

    The maximum is reduced over the block at every step; the sums stay per lane until the end, so that each
    element needs one exponential.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    is_ignored = target == IGNORE
    length = tl.where(is_ignored, 0, num_columns)  # an ignored row is not read
    row_ptr = logits_ptr + row * stride
    scale = LOG2_E / temperature
    maximum = tl.full((), -float("inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(logits, 0))
        anchor = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        old_shift = _at_least_lowest((maximum - anchor) * scale)
        old_scale = tl.exp2(old_shift)
        shifted = _at_least_lowest((logits - anchor) * scale)
        exp = tl.exp2(shifted)
        weighted = (weighted + old_shift * sum_exp) * old_scale + exp * shifted
        sum_exp = sum_exp * old_scale + exp
        maximum = new_maximum
    sum_exp = tl.where(is_ignored, 1.0, tl.sum(sum_exp, 0))
    weighted = tl.sum(weighted, 0) * LN_2
    maximum = tl.where(is_ignored, 0.0, maximum / temperature)
    local = target - vocab_offset
    is_owned = (local >= 0) & (local < num_columns) & (is_ignored == 0)
    target_logit = tl.load(row_ptr + tl.where(is_owned, local, 0), mask=is_owned, other=0.0).to(tl.float32)
    target_logit = tl.where(is_owned, target_logit / temperature, 0.0)
    is_valid = is_ignored | ((target >= 0) & (target < vocab_size))
    target_logit = tl.where(is_valid, target_logit, float("nan"))
    if IS_WHOLE:
        log_sum = tl.log2(sum_exp) * LN_2
        entropy = tl.maximum(log_sum - weighted / sum_exp, 0.0, propagate_nan=tl.PropagateNan.ALL)
        logprob = (target_logit - maximum) - log_sum
        tl.store(out_ptr + row, logprob)
        tl.store(out_ptr + num_rows + row, entropy)
        tl.store(out_ptr + 2 * num_rows + row, maximum)
        tl.store(out_ptr + 3 * num_rows + row, log_sum)
        tl.store(out_ptr + 4 * num_rows + row, entropy)
    else:
        tl.store(out_ptr + row, maximum)
        tl.store(out_ptr + num_rows + row, sum_exp)
        tl.store(out_ptr + 2 * num_rows + row, weighted)
        tl.store(out_ptr + 3 * num_rows + row, target_logit)


@triton.jit(do_not_specialize=["num_columns", "vocab_offset"])
def _logprob_bwd_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    maximum_ptr,
    log_sum_ptr,
    entropy_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    num_columns,
    stride,
    out_stride,
    vocab_offset,
    temperature,
    IGNORE: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of one row's gradient; `out` may be the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < num_columns
    target = tl.load(targets_ptr + row)
    length = tl.where(target == IGNORE, 0, num_columns)  # an ignored row is not read
    is_read = columns < length
    logits = tl.load(logits_ptr + row * stride + columns, mask=is_read, other=0.0).to(tl.float32)
    maximum = tl.load(maximum_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    logp = (logits - maximum * temperature) * (1.0 / temperature) - log_sum
    logp = _at_least_lowest(logp)
    dlogprob = 0.0
    if HAS_LOGPROB:
        dlogprob = tl.load(dlogprob_ptr + row).to(tl.float32)
    factor = dlogprob
    if HAS_ENTROPY:
        factor = dlogprob + tl.load(dentropy_ptr + row).to(tl.float32) * (logp + tl.load(entropy_ptr + row))
    gradient = tl.where(columns == target - vocab_offset, dlogprob, 0.0) - tl.exp2(logp * LOG2_E) * factor
    gradient = tl.where(is_read, gradient / temperature, 0.0)
    tl.store(out_ptr + row * out_stride + columns, gradient.to(out_ptr.dtype.element_ty), mask=exists)
