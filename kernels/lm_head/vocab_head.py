"""Launches of the vocabulary head's kernels, with their tile shapes and matrix products.

The matrix product of the logits is fused with their reduction, because statistics within 1e-4 need float32
logits, and writing those costs a fifth of the product's time. The two products of the gradient use cuBLAS on
a materialised operand, bf16 d(loss)/d(logits) of at most `CHUNK_BYTES`.
"""

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from glm_rlhf.kernels.dispatch.launch import is_interpreting, uses_triton
from glm_rlhf.kernels.lm_head.softmax_statistics import RowDistribution, SoftmaxStatistics
from glm_rlhf.kernels.lm_head.vocab_head_kernels import _linear_logprob_bwd_kernel, _linear_logprob_fwd_kernel
from glm_rlhf.kernels.lm_head.vocab_row_kernels import _dlogits_from_exp_kernel, _merge_partials_kernel

CHUNK_BYTES = 1 << 30
"""Most memory of one chunk of exponentials or of d(loss)/d(logits)."""
GROUP = 16
"""Row tiles processed together: 16 MB of hidden and 17 MB of weight in flight fit the 50 MB cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """Tile sizes of one program in the product hidden x weight."""

    rows: int
    columns: int
    width: int
    """Elements of the hidden dimension per step."""
    num_parts: int
    """1 or 4: column parts in which a tile of logits is reduced."""
    num_warps: int
    num_stages: int
    uses_tma: bool
    """Whether operands are loaded through tensor-memory-access descriptors instead of pointers."""


# 128 x 256 float32 accumulators are 128 registers per thread in two warpgroups, the largest possible tile;
# 4 stages of 48 KB leave 31 KB of 227. Reduced in one part it would spill.
HOPPER = TileShape(rows=128, columns=256, width=64, num_parts=4, num_warps=8, num_stages=4, uses_tma=True)
# Accumulators are in tensor memory, read by 8 warps in whole rows: splitting a tile moves data and spills.
BLACKWELL = TileShape(rows=128, columns=128, width=64, num_parts=1, num_warps=8, num_stages=4, uses_tma=True)
# Any address and width; 3 stages of 32 KB fit the 163 KB of sm_80.
PORTABLE = TileShape(rows=128, columns=128, width=64, num_parts=1, num_warps=8, num_stages=3, uses_tma=False)
# Products on CUDA cores, exact to float32: for checks, not for speed.
FLOAT32 = TileShape(rows=64, columns=64, width=32, num_parts=1, num_warps=8, num_stages=2, uses_tma=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLogits:
    """Logits of some rows as exp(z - maximum of the tile), a form that bf16 stores precisely."""

    exp_TV: torch.Tensor
    """`[T, V]` in the dtype of hidden, rows padded to 16 bytes."""
    tile_max_ST: torch.Tensor
    """`[column tiles, T]` float32."""
    tile_columns: int


def is_supported(hidden: torch.Tensor) -> bool:
    """Return whether these kernels support `hidden`: the exponent range of float16 is too small."""
    return uses_triton(hidden) and hidden.dtype in (torch.bfloat16, torch.float32)


def shard_statistics(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_offset: int,
    temperature: float,
) -> SoftmaxStatistics:
    """Return the softmax statistics, as `reference.linear_logprob.shard_statistics`."""
    return _forward(hidden_TD, weight_VD, targets_T, vocab_offset, temperature, keeps=False)[0]


def keep_logits(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_offset: int,
    temperature: float,
) -> tuple[SoftmaxStatistics, KeptLogits]:
    """Return the statistics of the rows, and the kept logits for `dlogits_of_kept`."""
    return _forward(hidden_TD, weight_VD, targets_T, vocab_offset, temperature, keeps=True)


def shard_gradients(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
    *,
    vocab_offset: int,
    temperature: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return `(dhidden_TD, dweight_VD)`, as `reference.linear_logprob.shard_gradients`.

    Chunks split the vocabulary, not the rows: a chunk's dweight is then complete, and only the much smaller
    dhidden is accumulated, in float32.
    """
    num_rows, num_columns = hidden_TD.shape[0], weight_VD.shape[0]
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=torch.float32) if wants_hidden else None
    dweight_VD = torch.empty_like(weight_VD) if wants_weight else None
    if num_rows == 0:
        return dhidden_TD, None if dweight_VD is None else dweight_VD.zero_()
    hidden_TD, weight_VD, targets_T = hidden_TD.contiguous(), weight_VD.contiguous(), targets_T.contiguous()
    shape = tile_shape(hidden_TD, weight_VD)
    fitting = CHUNK_BYTES // (num_rows * hidden_TD.element_size())
    chunk_columns = min(num_columns, max(1, fitting // shape.columns) * shape.columns)
    parameters_5T = row_parameters(distribution, dlogprob_T, dentropy_T, temperature)
    for first in range(0, num_columns, max(1, chunk_columns)):
        weight_chunk_VD = weight_VD[first : first + chunk_columns]
        size = weight_chunk_VD.shape[0]
        dlogits_TV = _rows_of_16_bytes(num_rows, size, hidden_TD)
        _linear_logprob_bwd_kernel[_grid(num_rows, size, shape)](
            *_operands(hidden_TD, weight_chunk_VD, shape),
            targets_T,
            parameters_5T,
            _written(dlogits_TV, shape),
            num_rows,
            size,
            hidden_TD.shape[1],
            dlogits_TV.stride(0),
            vocab_offset + first,
            temperature,
            HAS_ENTROPY=dentropy_T is not None,
            **_tile_arguments(hidden_TD, shape),
        )
        if wants_hidden:
            add_product_(dhidden_TD, dlogits_TV, weight_chunk_VD, is_first=first == 0)
        if wants_weight:
            add_product_(dweight_VD[first : first + size], dlogits_TV.t(), hidden_TD, is_first=True)
    return dhidden_TD, dweight_VD


def dlogits_of_kept(
    kept: KeptLogits,
    targets_T: torch.Tensor,
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor,
    dentropy_T: torch.Tensor | None,
    live: torch.Tensor | None,
    *,
    vocab_offset: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `(dlogits_LV, order)`: the gradient of the rows `live`, which overwrites the kept logits.

    Row k of the result belongs to row `order[k]` of the chunk (None: to row k). Live rows among the first
    `len(live)` keep their position; the others move to the positions of rows without a gradient.
    """
    num_rows, num_columns = kept.exp_TV.shape
    order = torch.arange(num_rows, device=targets_T.device) if live is None else _compacted(live, num_rows)
    num_live = order.shape[0]
    if num_live > 0 and num_columns > 0:
        tiles = max(1, 2048 // kept.tile_columns)  # 16 elements per thread: two 16-byte loads in flight
        _dlogits_from_exp_kernel[(num_live, triton.cdiv(num_columns, tiles * kept.tile_columns))](
            kept.exp_TV,
            kept.tile_max_ST,
            order,
            targets_T.contiguous(),
            row_parameters(distribution, dlogprob_T, dentropy_T, temperature),
            num_rows,
            num_columns,
            kept.exp_TV.stride(0),
            vocab_offset,
            HAS_ENTROPY=dentropy_T is not None,
            TILES=tiles,
            BLOCK_V=kept.tile_columns,
            num_warps=4,
        )
    return kept.exp_TV[:num_live], None if live is None else order


def add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, is_first: bool) -> None:
    """Add `left @ right`, accumulated in float32, to `out`; the first product overwrites it.

    From torch 2.10 on, `addmm` supports a float32 `out` with bf16 factors.
    """
    if not out.is_cuda:  # under the interpreter
        product = left.float() @ right.float()
        out.copy_(product if is_first else out + product)
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out) if is_first else torch.addmm(out, left, right, out=out)
    elif is_first:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def rows_per_chunk(num_columns: int, hidden_TD: torch.Tensor) -> int:
    """Return the number of rows whose kept logits fit `CHUNK_BYTES`, in whole tiles."""
    fitting = CHUNK_BYTES // (max(1, num_columns) * hidden_TD.element_size())
    return max(1, fitting // HOPPER.rows) * HOPPER.rows


def row_parameters(
    distribution: RowDistribution,
    dlogprob_T: torch.Tensor | None,
    dentropy_T: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """Return float32 `[5, T]`: max, log_sum, dlogprob, dlogprob + dentropy * H, dentropy.

    The last three are divided by the temperature: d(logits) = d(tempered logits) / temperature.
    """
    zeros_T = torch.zeros_like(distribution.max_T)
    dlogprob_T = zeros_T if dlogprob_T is None else dlogprob_T / temperature
    dentropy_T = zeros_T if dentropy_T is None else dentropy_T / temperature
    constant_T = dlogprob_T + dentropy_T * distribution.entropy_T
    return torch.stack([distribution.max_T, distribution.log_sum_T, dlogprob_T, constant_T, dentropy_T])


def tile_shape(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> TileShape:
    """Return the tile shape for these operands on this device."""
    if hidden_TD.dtype == torch.float32:
        return FLOAT32
    is_aligned = all(t.data_ptr() % 16 == 0 for t in (hidden_TD, weight_VD))
    is_aligned = is_aligned and hidden_TD.shape[1] * hidden_TD.element_size() % 16 == 0
    generation = 9 if is_interpreting() else torch.cuda.get_device_capability(hidden_TD.device)[0]
    if not is_aligned or generation < 9:
        return PORTABLE
    return HOPPER if generation == 9 else BLACKWELL


def _forward(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    vocab_offset: int,
    temperature: float,
    *,
    keeps: bool,
) -> tuple[SoftmaxStatistics, KeptLogits]:
    num_rows, num_columns = hidden_TD.shape[0], weight_VD.shape[0]
    hidden_TD, weight_VD, targets_T = hidden_TD.contiguous(), weight_VD.contiguous(), targets_T.contiguous()
    shape = tile_shape(hidden_TD, weight_VD)
    exp_TV = _rows_of_16_bytes(num_rows if keeps else 0, num_columns, hidden_TD)
    num_tiles = triton.cdiv(num_columns, shape.columns)
    partials_4ST = hidden_TD.new_empty(4, num_tiles, num_rows, dtype=torch.float32)
    kept = KeptLogits(exp_TV=exp_TV, tile_max_ST=partials_4ST[0], tile_columns=shape.columns)
    if num_rows == 0 or num_columns == 0:
        return SoftmaxStatistics.empty(num_rows, partials_4ST), kept
    _linear_logprob_fwd_kernel[_grid(num_rows, num_columns, shape)](
        *_operands(hidden_TD, weight_VD, shape),
        targets_T,
        _written(exp_TV, shape) if keeps else partials_4ST,
        partials_4ST,
        num_rows,
        num_columns,
        hidden_TD.shape[1],
        exp_TV.stride(0),
        vocab_offset,
        temperature,
        STORES_EXP=keeps,
        **_tile_arguments(hidden_TD, shape),
    )
    merged_4T = partials_4ST.new_empty(4, num_rows)
    # 16 tiles x 32 rows of four planes are 16 registers per thread; 256 programs at T = 8192 fill the device.
    _merge_partials_kernel[(triton.cdiv(num_rows, 32),)](
        partials_4ST, merged_4T, num_tiles, num_rows, BLOCK_S=16, BLOCK_T=32, num_warps=4
    )
    return SoftmaxStatistics(*merged_4T.unbind(0)), kept


def _grid(num_rows: int, num_columns: int, shape: TileShape) -> tuple[int]:
    return (triton.cdiv(num_rows, shape.rows) * triton.cdiv(num_columns, shape.columns),)


def _operands(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, shape: TileShape
) -> tuple[torch.Tensor | TensorDescriptor, ...]:
    if not shape.uses_tma:
        return hidden_TD, weight_VD
    return (
        TensorDescriptor.from_tensor(hidden_TD, [shape.rows, shape.width]),
        TensorDescriptor.from_tensor(weight_VD, [shape.columns, shape.width]),
    )


def _written(matrix: torch.Tensor, shape: TileShape) -> torch.Tensor | TensorDescriptor:
    part = [shape.rows, shape.columns // shape.num_parts]
    return TensorDescriptor.from_tensor(matrix, part) if shape.uses_tma else matrix


def _tile_arguments(hidden_TD: torch.Tensor, shape: TileShape) -> dict[str, int | bool]:
    return {
        "USES_TMA": shape.uses_tma,
        "WIDTH_IS_EVEN": hidden_TD.shape[1] % shape.width == 0,
        "UPCASTS": is_interpreting() and hidden_TD.dtype == torch.bfloat16,
        "NUM_PARTS": shape.num_parts,
        "GROUP": GROUP,
        "BLOCK_T": shape.rows,
        "BLOCK_V": shape.columns,
        "BLOCK_D": shape.width,
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }


def _rows_of_16_bytes(num_rows: int, num_columns: int, like: torch.Tensor) -> torch.Tensor:
    step = 16 // like.element_size()
    return like.new_empty(num_rows, triton.cdiv(num_columns, step) * step)[:, :num_columns]


def _compacted(live: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the source row of each of the first `len(live)` slots: itself if live, else a later live row."""
    num_live = live.shape[0]
    order = torch.arange(num_live, device=live.device)
    is_live = torch.zeros(num_rows, dtype=torch.bool, device=live.device).index_fill_(0, live, True)
    later_rows_first = live[torch.argsort((live < num_live).to(torch.int8), stable=True)]
    return order.masked_scatter_(~is_live[:num_live], later_rows_first)
