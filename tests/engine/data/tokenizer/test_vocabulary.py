"""The table of special tokens, and rows without a token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_rlhf.engine.data.tokenizer.vocabulary import (
    StreamDecoder,
    TokenTable,
    decode,
    ids_without_token,
    with_special_ids,
)

# ids 0..2 special, 3..258 the bytes, 259.. words with the space sign of sentencepiece; 262 is a hole
TABLE = TokenTable(
    bytes_by_id={3 + byte: bytes([byte]) for byte in range(256)}
    | {259: b" a", 260: b"  ", 261: b"xy", 263: b"z"},
    name_by_id={0: "<unk>", 1: "<s>", 2: "</s>"},
    spaced_ids=frozenset({259, 260}),
)
SMILE = [3 + byte for byte in "😀".encode()]


def test_size_is_one_more_than_the_largest_id():
    assert TABLE.size == 264


def test_one_leading_space_is_dropped_at_the_start_of_each_run():
    assert decode(TABLE, [259, 259]) == "a a"
    assert decode(TABLE, [260, 259]) == "  a"
    assert decode(TABLE, [259, 2, 259]) == "aa"
    assert decode(TABLE, [3 + ord(" "), 259]) == "  a"  # a byte token that is a space is no dummy space


def test_special_names_are_written_on_request():
    assert decode(TABLE, [1, 261, 2]) == "xy"
    assert decode(TABLE, [1, 261, 2], skip_special=False) == "<s>xy</s>"


def test_a_cut_character_is_replaced_and_not_an_error():
    assert decode(TABLE, [261, *SMILE[:3]]) == "xy\ufffd"
    assert decode(TABLE, [SMILE[0], 261]) == "\ufffdxy"


@pytest.mark.parametrize("bad", [262, 264, -1])
def test_an_id_without_a_token_raises_or_is_replaced(bad):
    with pytest.raises(ValueError, match=rf"ids\[1\] is {bad}"):
        decode(TABLE, [261, bad])
    assert decode(TABLE, [261, bad, 261], unknown="replace") == "xy\ufffdxy"
    stream = StreamDecoder(TABLE)
    stream.push(261)
    with pytest.raises(ValueError, match=rf"ids\[1\] is {bad}"):
        stream.push(bad)


def test_a_stream_writes_a_character_with_its_last_byte():
    stream = StreamDecoder(TABLE)
    assert [stream.push(token) for token in SMILE] == ["", "", "", "😀"]
    assert stream.finish() == ""


@given(st.lists(st.integers(0, 270)), st.booleans())
def test_streamed_pieces_joined_equal_the_whole(ids, skip_special):
    stream = StreamDecoder(TABLE, skip_special=skip_special, unknown="replace")
    streamed = "".join([stream.push(token) for token in ids]) + stream.finish()
    assert streamed == decode(TABLE, ids, skip_special=skip_special, unknown="replace")


def test_rows_without_token_are_holes_and_the_rows_behind():
    mask_V = ids_without_token(TABLE, 267)
    assert mask_V.dtype == torch.bool
    assert mask_V.nonzero().flatten().tolist() == [262, 264, 265, 266]


def test_special_ids_join_the_mask_but_for_the_named():
    mask_V = ids_without_token(TABLE, 264)
    joined_V = with_special_ids(mask_V, TABLE, except_names=["</s>"])
    assert joined_V.nonzero().flatten().tolist() == [0, 1, 262]
    assert mask_V.nonzero().flatten().tolist() == [262]


def test_fewer_rows_than_ids_are_refused():
    with pytest.raises(ValueError, match=r"263 rows.*up to 263"):
        ids_without_token(TABLE, 263)
