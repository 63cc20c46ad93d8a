"""A step's rows: the position of every token, the slot of its key, the sampled rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glm_rlhf.parallel.inference.step_inputs import (
    PinnedInputs,
    decode_batch,
    decode_shapes,
    fill_decodes,
    make_batch,
)
from glm_rlhf.parallel.inference.step_plan import SequenceWork

CPU = torch.device("cpu")


def work(tokens, start, pages, *, samples=True, seed=0, num_generated=0):
    return SequenceWork(
        sequence=0,
        tokens=tokens,
        start=start,
        pages=pages,
        samples=samples,
        seed=seed,
        num_generated=num_generated,
    )


def batch_of(decodes=(), prefills=()):
    return make_batch(SimpleNamespace(decodes=decodes, prefills=prefills), page_size=4, device=CPU)


DECODES = (
    work((11,), 5, (7, 2), seed=-(2**63), num_generated=3),
    work((12,), 0, (9,), seed=2**63 - 1),
)
PREFILLS = (
    work((21, 22, 23), 0, (4,), seed=5, num_generated=1),
    work((31, 32, 33, 34), 3, (8, 1), samples=False),
    work((41,), 8, (3, 6, 5), seed=6, num_generated=9),
)


def test_decodes_alone_are_all_drawn():
    batch = batch_of(DECODES)
    assert batch.tokens_T.tolist() == [11, 12]
    assert batch.positions_T.tolist() == [5, 0]
    assert batch.slots_T.tolist() == [2 * 4 + 1, 9 * 4]
    assert batch.page_table_BP.tolist() == [[7, 2], [9, 0]]
    assert batch.lengths_B.tolist() == [6, 1]
    assert batch.seeds_B.tolist() == [-(2**63), 2**63 - 1]
    assert batch.steps_B.tolist() == [3, 0]
    assert batch.sampled_rows is None
    assert (batch.num_decodes, batch.num_sampled, batch.prefill, batch.key_slots_S) == (2, 2, None, None)
    dtypes = [getattr(batch, name).dtype for name in ("tokens_T", "slots_T", "page_table_BP", "lengths_B")]
    assert dtypes == [torch.int64, torch.int64, torch.int32, torch.int32]


def test_prefills_stand_behind_decodes():
    batch = batch_of(DECODES, PREFILLS)
    assert batch.tokens_T.tolist() == [11, 12, 21, 22, 23, 31, 32, 33, 34, 41]
    assert batch.positions_T.tolist() == [5, 0, 0, 1, 2, 3, 4, 5, 6, 8]
    assert batch.slots_T.tolist() == [9, 36, 16, 17, 18, 8 * 4 + 3, 4, 5, 6, 5 * 4]
    assert batch.sampled_rows.tolist() == [0, 1, 4, 9]
    assert batch.seeds_B.tolist() == [-(2**63), 2**63 - 1, 5, 6]
    assert batch.steps_B.tolist() == [3, 0, 1, 9]
    segment = batch.prefill
    assert (segment.query_lengths, segment.key_lengths) == ((3, 4, 1), (3, 7, 9))
    assert (segment.query_end, segment.key_end) == (8, 19)
    assert segment.query_cu_seqlens.tolist() == [0, 3, 7, 8]
    assert segment.key_cu_seqlens.tolist() == [0, 3, 10, 19]
    assert segment.query_cu_seqlens.dtype == torch.int32
    expected = [16, 17, 18, 32, 33, 34, 35, 4, 5, 6, 12, 13, 14, 15, 24, 25, 26, 27, 20]
    assert batch.key_slots_S.tolist() == expected


def test_whole_prompts_need_no_keys_of_the_cache():
    batch = batch_of(prefills=PREFILLS[:1])
    assert batch.key_slots_S is None
    assert batch.num_decodes == 0
    assert batch.page_table_BP.shape == (0, 0)
    assert batch.sampled_rows.tolist() == [2]


def test_a_part_of_a_prompt_draws_nothing():
    batch = batch_of(prefills=PREFILLS[1:2])
    assert batch.num_sampled == 0
    assert batch.sampled_rows.tolist() == []


def test_filled_up_rows_write_and_see_nothing():
    numbers = PinnedInputs(decode_shapes(4, 3))
    fill_decodes(numbers.arrays, DECODES, 4)
    batch = decode_batch(numbers.to(CPU))
    assert batch.slots_T.tolist() == [9, 36, -1, -1]
    assert batch.lengths_B.tolist() == [6, 1, 0, 0]
    assert batch.page_table_BP.tolist() == [[7, 2, 0], [9, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert batch.num_sampled == 4


@pytest.mark.parametrize("sizes", [(3, 1), (0, 5), (2, 2, 7)])
def test_numbers_of_both_types_lie_end_to_end(sizes):
    shapes = [((size,), dtype) for size in sizes for dtype in (np.int32, np.int64)]
    numbers = PinnedInputs(shapes)
    for number, array in enumerate(numbers.arrays, 1):
        assert not array.any()
        array[:] = -number
    # In other memory the views have the same values: one copy moves all of them.
    for number, (view, (shape, dtype)) in enumerate(
        zip(numbers.views(numbers.words.clone()), shapes, strict=True), 1
    ):
        assert view.tolist() == [-number] * shape[0]
        assert view.dtype == (torch.int32 if dtype is np.int32 else torch.int64)
