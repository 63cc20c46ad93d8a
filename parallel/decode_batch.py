"""One step of generation as tensors: which tokens go through the model, and where their keys go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from glm_rlhf.parallel.packing import Segment


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
    """Row of the pool where its key and value go, int64."""
    num_decodes: int
    """B: leading rows that attend over pages."""
    page_table_BP: torch.Tensor
    """int32 [B, P], pages of the decoding sequences."""
    lengths_B: torch.Tensor
    """int32 [B], positions of the decoding sequences, the new one included."""
    prefill: Segment | None
    """Attention of the other rows, over `key_slots_S`; None when there are none."""
    key_slots_S: torch.Tensor | None
    """Rows of the pool with the prefilled sequences' keys, int64; None when every key is in this step."""
    sampled_rows: torch.Tensor
    """Rows whose next token is drawn, int64 [number drawn]."""
    seeds_B: torch.Tensor
    """Seed of each row that is drawn, int64."""
    steps_B: torch.Tensor
    """Draws made before for each row that is drawn, int64."""


def make_batch(plan: Plan, *, page_size: int, device: torch.device) -> DecodeBatch:
    """Return a step's rows on the device.

    Args:
        plan: at least one sequence.
        page_size: positions a page.
        device: of the model.
    """
    works = (*plan.decodes, *plan.prefills)
    tokens = [token for work in works for token in work.tokens]
    positions = [work.start + i for work in works for i in range(len(work.tokens))]
    slots = [slot for work in works for slot in _slots(work, work.start, page_size)]
    row, sampled = 0, []
    for work in works:
        row += len(work.tokens)
        if work.samples:
            sampled.append(row - 1)
    drawn = [work for work in works if work.samples]
    width = max((len(work.pages) for work in plan.decodes), default=0)
    table = [work.pages + (0,) * (width - len(work.pages)) for work in plan.decodes]
    has_context = any(work.start for work in plan.prefills)
    key_slots = (
        [slot for work in plan.prefills for slot in _slots(work, 0, page_size)] if has_context else None
    )

    def integers(values: Sequence, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return DecodeBatch(
        tokens_T=integers(tokens),
        positions_T=integers(positions),
        slots_T=integers(slots),
        num_decodes=len(plan.decodes),
        page_table_BP=integers(table, torch.int32).view(len(plan.decodes), width),
        lengths_B=integers([work.start + 1 for work in plan.decodes], torch.int32),
        prefill=_segment(plan, integers) if plan.prefills else None,
        key_slots_S=integers(key_slots) if has_context else None,
        sampled_rows=integers(sampled),
        seeds_B=integers([work.seed for work in drawn]),
        steps_B=integers([work.num_generated for work in drawn]),
    )


def _slots(work: Work, start: int, page_size: int) -> list[int]:
    """Return where the positions from `start` to the end of this step's tokens lie."""
    end = work.start + len(work.tokens)
    return [work.pages[p // page_size] * page_size + p % page_size for p in range(start, end)]


def _segment(plan: Plan, integers: Callable[..., torch.Tensor]) -> Segment:
    query_lengths = tuple(len(work.tokens) for work in plan.prefills)
    key_lengths = tuple(work.start + len(work.tokens) for work in plan.prefills)
    return Segment(
        query_start=0,
        query_end=sum(query_lengths),
        key_start=0,
        key_end=sum(key_lengths),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_cu_seqlens=integers((0, *query_lengths), torch.int32).cumsum(0, dtype=torch.int32),
        key_cu_seqlens=integers((0, *key_lengths), torch.int32).cumsum(0, dtype=torch.int32),
    )
