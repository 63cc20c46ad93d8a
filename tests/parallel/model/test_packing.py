"""Packing: streams, their padding, and the shards of context-parallel ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.model.token_outputs import next_tokens


def sequences_of(lengths):
    return [torch.arange(length) + 100 * index for index, length in enumerate(lengths)]


def visible_keys(token_share):
    """Stream rows that each of this rank's rows sees, from the segments alone."""
    seen = {}
    rows = token_share.rows
    for segment in token_share.segments:
        query, key = segment.query_start, segment.key_start
        for num_queries, num_keys in zip(segment.query_lengths, segment.key_lengths, strict=True):
            for i in range(num_queries):
                row = query + i if rows is None else int(rows[query + i])
                seen[row] = set(range(key, key + num_keys - num_queries + i + 1))
            query, key = query + num_queries, key + num_keys
        assert (query, key) == (segment.query_end, segment.key_end)
    return seen


def test_a_stream_by_hand():
    packed = pack(sequences_of([3, 0, 2]), multiple=4, padding_token=7)
    assert packed.tokens_T.tolist() == [0, 1, 2, 200, 201, 7, 7, 7]
    assert packed.boundaries == [0, 3, 3, 5]
    assert packed.spans == [(0, 3), (3, 5), (5, 8)]
    assert [part.tolist() for part in packed.split(packed.tokens_T)] == [[0, 1, 2], [], [200, 201]]
    assert share(packed).positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([1, 2, 3]))
def test_context_parallel_ranks_together_see_what_one_rank_sees(lengths, cp_size):
    if not sum(lengths):
        return
    packed = pack(sequences_of(lengths), multiple=2 * cp_size)
    expected = {row: set(range(a, row + 1)) for a, b in packed.spans for row in range(a, b)}
    assert visible_keys(share(packed)) == expected
    together, stream = {}, []
    for rank in range(cp_size):
        part = share(packed, cp_rank=rank, cp_size=cp_size)
        together |= visible_keys(part)
        stream.append(part.take(packed.tokens_T))
        assert torch.equal(part.positions_T, part.take(share(packed).positions_T))
    assert together == expected
    if cp_size > 1:
        order = share(packed, cp_rank=0, cp_size=cp_size).stream_order
        assert torch.equal(torch.cat(stream)[order], packed.tokens_T)


def test_work_of_one_long_sequence_is_even_over_context_parallel_ranks():
    packed = pack([torch.zeros(64, dtype=torch.int64)], multiple=8)
    work = [sum(map(len, visible_keys(share(packed, cp_rank=r, cp_size=4)).values())) for r in range(4)]
    assert max(work) == min(work)


@pytest.mark.parametrize(
    "sequences, message",
    [
        ([], "0 sequences without a single token"),
        ([torch.zeros(0, dtype=torch.int64)], "1 sequences without a single token"),
        ([torch.zeros(2)], "1-D tensor of torch.float32"),
        ([torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool)], "sequence 1 .* torch.bool"),
        ([torch.zeros(2, 2, dtype=torch.int64)], "2-D tensor"),
    ],
)
def test_what_cannot_be_packed_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        pack(sequences)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_what_belongs_to_a_stream_is_on_its_device(cp_size):
    packed = pack(sequences_of([3, 0, 6]), multiple=8)
    there = packed.to(torch.device("meta"))  # a device without data, so that nothing is read from it either
    assert (there.lengths, there.num_padding) == (packed.lengths, packed.num_padding)
    part = share(there, cp_rank=cp_size - 1, cp_size=cp_size)
    tensors = [there.tokens_T, part.positions_T, part.take(there.tokens_T), next_tokens(there)]
    tensors += [t for s in part.segments for t in (s.query_cu_seqlens, s.key_cu_seqlens)]
    tensors += [part.rows, part.stream_order] if cp_size > 1 else []
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {s.query_cu_seqlens.dtype for s in part.segments} == {torch.int32}


def test_a_stream_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="6 packed tokens are not a multiple of 2 × cp 2"):
        share(pack(sequences_of([6])), cp_rank=0, cp_size=2)
