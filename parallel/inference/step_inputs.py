"""The input tensors of one generation step: the tokens, and the cache slots of their keys and values.

All inputs of a step are adjacent in one host tensor, so that one copy moves them to the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from glm_rlhf.parallel.inference.step_plan import SequenceWork, StepPlan
from glm_rlhf.parallel.model.packing import Segment

Shape = tuple[tuple[int, ...], type]
"""Shape of an array, and its type: np.int64 or np.int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """The rows of a step: first one per decoding sequence, then the prefilled tokens."""

    tokens_T: torch.Tensor
    """Token ids, int64."""
    positions_T: torch.Tensor
    """Position of each token in its sequence, int64."""
    slots_T: torch.Tensor
    """Row of the pool for its key and value, int64; −1 for a padding row."""
    num_decodes: int
    """B: leading rows that attend over pages."""
    page_table_BP: torch.Tensor
    """int32 [B, P], pages of the decoding sequences."""
    lengths_B: torch.Tensor
    """int32 [B], positions of the decoding sequences, including the new one; 0 for a padding row."""
    prefill: Segment | None
    """Attention of the other rows, over `key_slots_S`; None when there are none."""
    key_slots_S: torch.Tensor | None
    """Rows of the pool with the prefilled sequences' keys, int64; None when every key is in this step."""
    sampled_rows: torch.Tensor | None
    """Rows whose next token is sampled, int64 [number sampled]; None when it is every row."""
    seeds_B: torch.Tensor
    """Seed of each sampled row, int64."""
    steps_B: torch.Tensor
    """Number of tokens sampled before for each sampled row, int64."""

    @property
    def num_sampled(self) -> int:
        """Rows whose next token is sampled."""
        return len(self.seeds_B)


def make_batch(plan: StepPlan, *, page_size: int, device: torch.device) -> DecodeBatch:
    """Return a step's rows on the device.

    Args:
        plan: of at least one sequence.
        page_size: positions per page.
        device: of the model.
    """
    decodes, prefills = plan.decodes, plan.prefills
    width = max((len(work.pages) for work in decodes), default=0)
    if not prefills:
        inputs = PinnedInputs(decode_shapes(len(decodes), width))
        fill_decodes(inputs.arrays, decodes, page_size)
        return decode_batch(inputs.to(device))
    query_lengths = tuple(len(work.tokens) for work in prefills)
    key_lengths = tuple(work.start + len(work.tokens) for work in prefills)
    num_sampled = len(decodes) + sum(work.samples for work in prefills)
    num_context = sum(key_lengths) if any(work.start for work in prefills) else 0
    inputs = PinnedInputs(
        [
            *decode_shapes(
                len(decodes), width, num_rows=len(decodes) + sum(query_lengths), num_sampled=num_sampled
            ),
            ((num_sampled,), np.int64),
            ((len(prefills) + 1,), np.int32),
            ((len(prefills) + 1,), np.int32),
            ((num_context,), np.int64),
        ]
    )
    fill_decodes(inputs.arrays, decodes, page_size)
    _fill_prefills(inputs.arrays, prefills, len(decodes), page_size)
    *tensors, sampled_rows, query_cu_seqlens, key_cu_seqlens, key_slots_S = inputs.to(device)
    segment = Segment(
        query_start=0,
        query_end=sum(query_lengths),
        key_start=0,
        key_end=sum(key_lengths),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_cu_seqlens=query_cu_seqlens,
        key_cu_seqlens=key_cu_seqlens,
    )
    return decode_batch(
        tensors, sampled_rows=sampled_rows, prefill=segment, key_slots_S=key_slots_S if num_context else None
    )


def decode_shapes(
    num_decodes: int, table_width: int, *, num_rows: int | None = None, num_sampled: int | None = None
) -> list[Shape]:
    """Return shape and type of tokens, positions, slots, seeds, steps, lengths and page table.

    Args:
        num_decodes: rows that attend over pages.
        table_width: columns of the page table.
        num_rows: all rows, if there are prefilled ones.
        num_sampled: rows whose next token is sampled, if not every row.
    """
    per_row = ((num_decodes if num_rows is None else num_rows,), np.int64)
    per_sample = ((num_decodes if num_sampled is None else num_sampled,), np.int64)
    return [
        *(per_row, per_row, per_row, per_sample, per_sample),
        ((num_decodes,), np.int32),
        ((num_decodes, table_width), np.int32),
    ]


def fill_decodes(arrays: Sequence[np.ndarray], works: Sequence[SequenceWork], page_size: int) -> None:
    """Write decoding sequences into the first rows of zero arrays of `decode_shapes`.

    Further decode rows are padding: they write no key, attend to no position, and their token is not read.
    """
    count = len(works)
    arrays[2][count : len(arrays[5])] = -1
    if not works:
        return
    rows = (
        (work.tokens[0], work.start, work.pages[-1], work.seed, work.num_generated, len(work.pages))
        for work in works
    )
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=6 * count).reshape(count, 6)
    tokens, positions, last_pages, seeds, steps, num_pages = values.T
    slots = last_pages * page_size + positions % page_size
    columns = (tokens, positions, slots, seeds, steps, positions + 1)
    for array, column in zip(arrays, columns, strict=False):
        array[:count] = column
    table = arrays[6][:count]
    pages = np.fromiter(chain.from_iterable(work.pages for work in works), dtype=np.int32)
    table[np.arange(table.shape[1]) < num_pages[:, None]] = pages


def _fill_prefills(
    arrays: Sequence[np.ndarray], works: Sequence[SequenceWork], num_decodes: int, page_size: int
) -> None:
    """Write prefilled sequences after the decoding ones."""
    tokens, positions, slots, seeds, steps, _, _, sampled_rows, query_cu, key_cu, key_slots = arrays
    sampled_rows[:num_decodes] = np.arange(num_decodes)
    row = sample = num_decodes
    num_keys = 0
    for index, work in enumerate(works, 1):
        first, row, end = row, row + len(work.tokens), work.start + len(work.tokens)
        sequence_slots = _slots(work, end, page_size)
        tokens[first:row] = work.tokens
        positions[first:row] = np.arange(work.start, end)
        slots[first:row] = sequence_slots[work.start :]
        if work.samples:
            sampled_rows[sample], seeds[sample], steps[sample] = row - 1, work.seed, work.num_generated
            sample += 1
        if len(key_slots):
            key_slots[num_keys : num_keys + end] = sequence_slots
        num_keys += end
        query_cu[index], key_cu[index] = row - num_decodes, num_keys


def _slots(work: SequenceWork, num_positions: int, page_size: int) -> np.ndarray:
    """Return the cache slots of the first positions of a sequence."""
    first_slots = np.array(work.pages, dtype=np.int64)[:, None] * page_size
    return (first_slots + np.arange(page_size)).reshape(-1)[:num_positions]


def decode_batch(
    tensors: Sequence[torch.Tensor],
    *,
    prefill: Segment | None = None,
    sampled_rows: torch.Tensor | None = None,
    key_slots_S: torch.Tensor | None = None,
) -> DecodeBatch:
    """Return the batch of tensors in the order of `decode_shapes`."""
    tokens_T, positions_T, slots_T, seeds_B, steps_B, lengths_B, page_table_BP = tensors
    return DecodeBatch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        slots_T=slots_T,
        num_decodes=len(lengths_B),
        page_table_BP=page_table_BP,
        lengths_B=lengths_B,
        prefill=prefill,
        key_slots_S=key_slots_S,
        sampled_rows=sampled_rows,
        seeds_B=seeds_B,
        steps_B=steps_B,
    )


class PinnedInputs:
    """Arrays of int64 and int32, adjacent in one host tensor.

    With CUDA the memory is pinned: copies from it are asynchronous, and torch does not reuse the memory
    before they are done.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        """Make arrays of zeros."""
        self._shapes = shapes
        self._num_words = [-(-math.prod(shape) // (2 if dtype is np.int32 else 1)) for shape, dtype in shapes]
        self.words = torch.zeros(
            sum(self._num_words), dtype=torch.int64, pin_memory=torch.cuda.is_available()
        )
        self.arrays = []
        """Views to be filled."""
        words, end = self.words.numpy(), 0
        for (shape, dtype), num_words in zip(shapes, self._num_words, strict=True):
            start, end = end, end + num_words
            self.arrays.append(words[start:end].view(dtype)[: math.prod(shape)].reshape(shape))

    def to(self, device: torch.device) -> list[torch.Tensor]:
        """Return the arrays as tensors of the device, by one copy."""
        return self.views(self.words.to(device, non_blocking=True))

    def views(self, words: torch.Tensor) -> list[torch.Tensor]:
        """Return tensors of the arrays' shapes and types in the memory of `words`."""
        tensors = []
        for part, (shape, dtype) in zip(words.split(self._num_words), self._shapes, strict=True):
            if dtype is np.int32:
                part = part.view(torch.int32)[: math.prod(shape)]
            tensors.append(part if len(shape) == 1 else part.view(shape))
        return tensors
