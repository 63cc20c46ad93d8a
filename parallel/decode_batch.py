"""One step of generation as tensors: which tokens go through the model, and where their keys go.

All numbers of a step are laid end to end on the host, so that one copy brings them to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from glm_rlhf.parallel.packing import Segment

_WORD_BYTES = 8


class Work(Protocol):
    """What one sequence does in a step; `engine.rollout.queue.SequenceWork`."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    samples: bool
    seed: int
    num_generated: int


class Plan(Protocol):
    """Who runs in a step; `engine.rollout.queue.Step`."""

    copies: tuple[tuple[int, int], ...]
    decodes: tuple[Work, ...]
    prefills: tuple[Work, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """The rows of a step: first one a decoding sequence, then the prefilled tokens."""

    tokens_T: torch.Tensor
    """Token ids, int64."""
    positions_T: torch.Tensor
    """Position of each token in its sequence, int64."""
    slots_T: torch.Tensor
    """Row of the pool where its key and value go, int64; −1 for a row that only fills up the batch."""
    num_decodes: int
    """B: leading rows that attend over pages."""
    page_table_BP: torch.Tensor
    """int32 [B, P], pages of the decoding sequences."""
    lengths_B: torch.Tensor
    """int32 [B], positions of the decoding sequences, the new one included; 0 for a row that fills up."""
    prefill: Segment | None
    """Attention of the other rows, over `key_slots_S`; None when there are none."""
    key_slots_S: torch.Tensor | None
    """Rows of the pool with the prefilled sequences' keys, int64; None when every key is in this step."""
    sampled_rows: torch.Tensor | None
    """Rows whose next token is drawn, int64 [number drawn]; None when it is every row."""
    seeds_B: torch.Tensor
    """Seed of each row that is drawn, int64."""
    steps_B: torch.Tensor
    """Draws made before for each row that is drawn, int64."""

    @property
    def num_drawn(self) -> int:
        """Rows whose next token is drawn."""
        return len(self.seeds_B)


def make_batch(plan: Plan, *, page_size: int, device: torch.device) -> DecodeBatch:
    """Return a step's rows on the device.

    Args:
        plan: at least one sequence.
        page_size: positions a page.
        device: of the model.
    """
    decodes, prefills = plan.decodes, plan.prefills
    width = max((len(work.pages) for work in decodes), default=0)
    numbers = decode_numbers(decodes, page_size=page_size, num_rows=len(decodes), table_width=width)
    if not prefills:
        return decode_batch(_on_device(numbers, device))
    query_lengths = tuple(len(work.tokens) for work in prefills)
    key_lengths = tuple(work.start + len(work.tokens) for work in prefills)
    numbers = _with_prefills(numbers, prefills, page_size)
    numbers += [np.cumsum((0, *lengths), dtype=np.int32) for lengths in (query_lengths, key_lengths)]
    has_context = any(work.start for work in prefills)
    if has_context:
        of_all_keys = zip(prefills, map(np.arange, key_lengths), strict=True)
        numbers.append(np.concatenate([_slots(work, span, page_size) for work, span in of_all_keys]))
    tensors = _on_device(numbers, device)
    segment = Segment(
        query_start=0,
        query_end=sum(query_lengths),
        key_start=0,
        key_end=sum(key_lengths),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_cu_seqlens=tensors[8],
        key_cu_seqlens=tensors[9],
    )
    return decode_batch(
        tensors[:7],
        sampled_rows=tensors[7],
        prefill=segment,
        key_slots_S=tensors[10] if has_context else None,
    )


def _with_prefills(numbers: list[np.ndarray], prefills: Sequence[Work], page_size: int) -> list[np.ndarray]:
    """Return the numbers of decodes with the rows of prefills behind them, and the rows that are drawn."""
    tokens, positions, slots, seeds, steps, lengths, table = numbers
    spans = [np.arange(work.start, work.start + len(work.tokens)) for work in prefills]
    last_rows = len(tokens) - 1 + np.cumsum([len(span) for span in spans])
    drawn = [work for work in prefills if work.samples]
    return [
        np.concatenate([tokens, *(work.tokens for work in prefills)]),
        np.concatenate([positions, *spans]),
        np.concatenate([slots, *(_slots(w, span, page_size) for w, span in zip(prefills, spans, strict=True))]),
        np.concatenate([seeds, [work.seed for work in drawn]]).astype(np.int64),
        np.concatenate([steps, [work.num_generated for work in drawn]]).astype(np.int64),
        lengths,
        table,
        np.concatenate([np.arange(len(tokens)), last_rows[[work.samples for work in prefills]]]),
    ]


def decode_numbers(
    works: Sequence[Work], *, page_size: int, num_rows: int, table_width: int
) -> list[np.ndarray]:
    """Return what `decode_batch` wants to know of decoding sequences, filled up to `num_rows` rows.

    A row that fills up writes no key, sees no position and draws a token that nobody reads.

    Args:
        works: one token each.
        page_size: positions a page.
        num_rows: at least as many as there are works.
        table_width: columns of the page table, at least the most pages of a work.
    """
    num_works = len(works)
    by_row = np.zeros((5, num_rows), dtype=np.int64)
    tokens, positions, slots, seeds, steps = by_row
    lengths = np.zeros(num_rows, dtype=np.int32)
    table = np.zeros((num_rows, table_width), dtype=np.int32)
    slots[num_works:] = -1
    if num_works:
        starts = positions[:num_works]
        last_pages = slots[:num_works]
        num_pages = np.empty(num_works, dtype=np.int64)
        for values, of in (
            (tokens, [work.tokens[0] for work in works]),
            (starts, [work.start for work in works]),
            (last_pages, [work.pages[-1] for work in works]),
            (seeds, [work.seed for work in works]),
            (steps, [work.num_generated for work in works]),
            (num_pages, [len(work.pages) for work in works]),
        ):
            values[:num_works] = of
        last_pages *= page_size
        last_pages += starts % page_size
        lengths[:num_works] = starts + 1
        pages = np.fromiter(chain.from_iterable(work.pages for work in works), dtype=np.int32)
        table[:num_works][np.arange(table_width) < num_pages[:, None]] = pages
    return [tokens, positions, slots, seeds, steps, lengths, table]


def decode_batch(
    tensors: Sequence[torch.Tensor],
    *,
    prefill: Segment | None = None,
    sampled_rows: torch.Tensor | None = None,
    key_slots_S: torch.Tensor | None = None,
) -> DecodeBatch:
    """Return the batch of tensors that stand in the order of `decode_numbers`."""
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


def pack(numbers: Sequence[np.ndarray]) -> torch.Tensor:
    """Return arrays of int64 and int32 laid end to end in one host tensor of int64 words.

    The tensor is pinned where there is CUDA: a copy from it need not be waited for, and its memory is not
    given to another tensor before the copy is done.
    """
    num_words = sum(_num_words(array) for array in numbers)
    words = torch.empty(num_words, dtype=torch.int64, pin_memory=torch.cuda.is_available())
    on_host, end = words.numpy(), 0
    for array in numbers:
        start, end = end, end + _num_words(array)
        on_host[start:end].view(array.dtype)[: array.size] = array.reshape(-1)
    return words


def unpack(words: torch.Tensor, like: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Return views of packed words with the shapes and types of the arrays that were packed."""
    tensors, end = [], 0
    for array in like:
        start, end = end, end + _num_words(array)
        part = words[start:end]
        if array.dtype == np.int32:
            part = part.view(torch.int32)[: array.size]
        tensors.append(part.view(array.shape))
    return tensors


def _on_device(numbers: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    return unpack(pack(numbers).to(device, non_blocking=True), numbers)


def _num_words(array: np.ndarray) -> int:
    return -(-array.nbytes // _WORD_BYTES)


def _slots(work: Work, positions: np.ndarray, page_size: int) -> np.ndarray:
    """Return where these positions of a sequence lie."""
    pages, offsets = np.divmod(positions, page_size)
    return np.array(work.pages, dtype=np.int64)[pages] * page_size + offsets
