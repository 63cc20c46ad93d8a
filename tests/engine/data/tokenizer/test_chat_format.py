"""Chat formats: the exact ids of ChatGLM2, ChatGLM3 and GLM-4 conversations."""

import time

import pytest

from glm_rlhf.engine.data.messages import Message, RoleError
from glm_rlhf.engine.data.tokenizer.chat_format import (
    CHATGLM2,
    CHATGLM3,
    GLM4,
    Marker,
    opening_text_of_template,
    with_opening_text,
)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str, metadata: str = "") -> Message:
    return Message(role="assistant", content=text, metadata=metadata)


def test_chatglm3_puts_metadata_and_content_into_segments_of_their_own():
    assert CHATGLM3.turns([user("hi"), assistant("f()", "get_weather")]) == [
        *(Marker("<|user|>"), "\n", "hi"),
        *(Marker("<|assistant|>"), "get_weather\n", "f()"),
    ]
    assert CHATGLM3.answer("yes") == ["\n", "yes", Marker("</s>")]


def test_glm4_joins_header_and_content():
    assert GLM4.turns([Message(role="system", content="be kind"), user("hi")]) == [
        *(Marker("<|system|>"), "\nbe kind"),
        *(Marker("<|user|>"), "\nhi"),
    ]
    assert GLM4.answer("yes") == ["\nyes", Marker("<|user|>")]


def test_chatglm2_numbers_its_rounds_in_one_text():
    assert CHATGLM2.turns([user("一"), assistant("二"), user("三")]) == [
        "[Round 1]\n\n问：一\n\n答：二\n\n[Round 2]\n\n问：三\n\n答："
    ]
    assert CHATGLM2.turns([user("一"), assistant("二")]) == ["[Round 1]\n\n问：一\n\n答：二"]
    assert CHATGLM2.answer("四") == ["四", Marker("</s>")]


@pytest.mark.parametrize(
    ("messages", "position"),
    [
        ([Message(role="system", content="s"), user("u")], 0),
        ([user("u"), assistant("a"), Message(role="observation", content="o")], 2),
        ([user("u"), assistant("f()", "tool")], 1),
    ],
)
def test_chatglm2_refuses_turns_it_has_no_form_for(messages, position):
    with pytest.raises(RoleError) as caught:
        CHATGLM2.turns(messages)
    assert caught.value.position == position


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("…{% if add_generation_prompt %}<|assistant|>{% endif %}", ""),
        ("…{% if add_generation_prompt %}<|assistant|>\n{% endif %}", "\n"),
        ("…{% if add_generation_prompt %}<|assistant|>\n{%- endif %}", ""),
        ("…{%- if add_generation_prompt -%}<|assistant|>\n<think>{%- endif %}", "\n<think>"),
        ("…{% if add_generation_prompt %}<|assistant|>{{ thought }}{% endif %}", ""),
        ("{% for message in messages %}<|assistant|>\n{% endfor %}", ""),
        ("", ""),
    ],
)
def test_the_text_behind_the_last_assistant_marker_is_read_from_a_template(template, text):
    assert opening_text_of_template(template) == text


def test_text_in_the_prompt_takes_the_header_from_the_answer():
    chat = with_opening_text(GLM4, "\n<think>")
    assert chat.opening == (Marker("<|assistant|>"), "\n<think>")
    assert chat.answer("yes") == ["yes", Marker("<|user|>")]
    assert with_opening_text(GLM4, "") is GLM4


@pytest.mark.parametrize(
    "part", [" ", "if add_generation_prompt %}<|assistant|>", "if add_generation_prompt %}<|assistant|>{"]
)
def test_a_template_costs_linear_time(part):
    template = "{% if add_generation_prompt %}<|assistant|>" + part * (500_000 // len(part))
    start = time.process_time()
    assert opening_text_of_template(template) == ""
    assert time.process_time() - start < 2
