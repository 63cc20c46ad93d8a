"""Ids of a record's prompt and answers."""

from pathlib import Path

import pytest

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.records.reading import RecordError, RecordLocation
from glm_rlhf.engine.data.records.schema import TokenIds
from glm_rlhf.engine.data.records.token_ids import answer_ids, prompt_ids

PLACE = RecordLocation(path=Path("data.jsonl"), line=3, index=2)
TURNS = (Message(role="system", content="be kind"), Message(role="user", content="3+4?"))


def test_texts_are_rendered(either):
    expected = either.render_prompt_response(TURNS, "7")
    assert (prompt_ids(TURNS, PLACE, either), answer_ids("7", PLACE, either)) == expected


def test_ids_need_no_tokenizer_and_are_used_unchanged():
    assert prompt_ids(TokenIds((5, 6)), PLACE, None) == [5, 6]
    assert answer_ids(TokenIds((7,)), PLACE, None) == [7]


def test_text_without_a_tokenizer_is_an_error_of_the_record():
    for ids_of, value in ((prompt_ids, TURNS), (answer_ids, "7")):
        with pytest.raises(RecordError, match=r"^data\.jsonl:3: .*there is no tokenizer") as caught:
            ids_of(value, PLACE, None)
        assert caught.value.line == 3


def test_turns_outside_the_chat_format_are_an_error_of_the_record(chatglm2):
    with pytest.raises(
        RecordError, match=r"data\.jsonl:3: messages\[0\]: ChatGLM2's format has no system turn"
    ):
        prompt_ids(TURNS, PLACE, chatglm2)
