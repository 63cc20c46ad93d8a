"""What holds for both kinds of vocabulary."""

import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_rlhf.engine.data.messages import Message, RoleError

MARKERS = [
    *("<|user|>", "<|system|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
    *("[gMASK]", "[MASK]", "[sMASK]", "sop", "eop", "<sop>", "<eop>", "</s>", "<s>", "<unk>", "<pad>"),
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


def user(text: str) -> Message:
    return Message(role="user", content=text)


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("around", ["{}", "a{}b", " {} ", "\n{}\n{}", "你{}好"])
def test_a_typed_marker_stays_text(either, marker, around):
    text = around.format(marker, marker)
    special = either.table.name_by_id.keys()
    assert special.isdisjoint(either.encode(text))
    assert either.decode(either.encode(text)) == text
    # In a conversation only the template's markers are special, wherever the text is.
    messages = [
        Message(role="system", content=text),
        user(text),
        Message(role="assistant", content=text),
        user(text),
    ]
    plain = [Message(role=message.role, content="x") for message in messages]
    placed = [
        [token for token in either.render(turns, add_generation_prompt=True) if token in special]
        for turns in (messages, plain)
    ]
    assert placed[0] == placed[1]
    assert [token for token in either.render_response(text) if token in special] == [either.end_id]


@given(text=ANY_TEXT)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(either, text):
    assert either.decode(either.encode(text)) == text
    assert either.decode_response(either.render_response(text)) == text


@given(text=ANY_TEXT, reply=ANY_TEXT)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prompt_and_response_are_the_conversation_as_one(either, text, reply):
    question = [user(f"q{text}")]
    prompt_ids, response_ids = either.render_prompt_response(question, reply)
    whole = either.render([*question, Message(role="assistant", content=reply)], add_generation_prompt=False)
    assert [*prompt_ids, *response_ids] == [*whole, either.end_id]


@given(ids=st.lists(st.integers(0, 400), max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streamed_pieces_joined_equal_the_whole(either, ids):
    stream = either.stream(unknown="replace")
    assert "".join([stream.push(token) for token in ids]) + stream.finish() == either.decode(
        ids, unknown="replace"
    )


def test_every_stop_may_be_sampled_and_the_prefix_may_not(either):
    never_V = either.unsampleable_ids(either.vocab_size + 5)
    assert not never_V[list(either.stop_ids)].any()
    assert either.end_id in either.stop_ids
    assert never_V[either.prefix_ids].all()
    assert never_V[either.vocab_size :].all()
    assert not never_V[either.encode("What is 3 plus 4?")].any()


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"]])
def test_what_is_no_text_is_refused(either, text):
    with pytest.raises(ValueError, match="encode needs a str"):
        either.encode(text)


def test_a_lone_surrogate_is_refused(either):
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        either.encode("ab\udc00")
    with pytest.raises(ValueError, match="lone surrogate"):
        either.render_response("ab\udc00")
    with pytest.raises(RoleError, match=r"messages\[0\].*lone surrogate"):
        either.render([user("ab\udc00")], add_generation_prompt=True)


def test_a_conversation_in_wrong_order_is_refused_with_its_position(either):
    with pytest.raises(RoleError, match=r"messages\[1\]: 'user' cannot follow 'user'"):
        either.render([user("a"), user("b")], add_generation_prompt=True)


def test_an_unknown_id_is_refused_or_replaced(either):
    beyond = either.vocab_size
    with pytest.raises(ValueError, match=f"is {beyond}, which no token has"):
        either.decode([beyond])
    assert either.decode([beyond], unknown="replace") == "\ufffd"


def test_an_answer_without_its_header_keeps_all_its_text(either):
    assert either.decode_response(either.encode("tool")) == "tool"
    assert either.decode_response([]) == ""


def test_an_empty_answer_is_header_and_end(either):
    assert either.decode_response(either.render_response("")) == ""
    assert either.render_response("")[-1] == either.end_id


def test_a_copy_by_pickling_encodes_alike_and_keeps_typed_markers_text(either):
    copy = pickle.loads(pickle.dumps(either))
    for text in ("3加4等于多少？", "a<|user|>b"):
        assert copy.encode(text) == either.encode(text)
    assert copy.table == either.table
    assert copy.stop_ids == either.stop_ids
