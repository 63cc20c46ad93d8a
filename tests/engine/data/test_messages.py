"""Conversations: roles, their order, and what is refused."""

import pickle

import pytest

from glm_rlhf.engine.data.messages import Message, RoleError, check_conversation, lone_surrogate


def turns(*roles: str) -> list[Message]:
    return [Message(role=role, content=f"text of {role}") for role in roles]


@pytest.mark.parametrize(
    "roles",
    [
        ["user"],
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
        ["user", "assistant", "observation"],
        ["user", "assistant", "observation", "assistant", "user"],
    ],
)
def test_orders_that_await_an_answer_are_allowed(roles):
    check_conversation(turns(*roles), ends_open=True)


@pytest.mark.parametrize(
    ("roles", "position", "says"),
    [
        (["assistant", "user"], 0, "cannot open"),
        (["observation"], 0, "cannot open"),
        (["user", "user"], 1, "cannot follow 'user'; expected assistant"),
        (["user", "assistant", "system", "user"], 2, "cannot follow 'assistant'"),
        (["system", "system", "user"], 1, "cannot follow 'system'; expected user"),
        (["system", "assistant"], 1, "cannot follow"),
        (["user", "observation"], 1, "cannot follow"),
        (["user", "assistant", "assistant", "user"], 2, "cannot follow"),
        (["user", "human"], 1, "unknown role 'human'; known roles are system, user"),
    ],
)
def test_a_role_out_of_order_is_named_with_its_position(roles, position, says):
    with pytest.raises(RoleError, match=rf"messages\[{position}\].*{says}") as caught:
        check_conversation(turns(*roles), ends_open=False)
    assert caught.value.position == position


def test_a_tool_call_may_follow_the_assistants_own_thought():
    thought, call = (
        turns("user", "assistant"),
        Message(role="assistant", content="f()", metadata="get_weather"),
    )
    check_conversation([*thought, call, *turns("observation")], ends_open=True)


@pytest.mark.parametrize("roles", [["user", "assistant"], ["system"]])
def test_a_last_turn_that_awaits_no_answer_is_refused_only_when_one_is_to_follow(roles):
    check_conversation(turns(*roles), ends_open=False)
    with pytest.raises(RoleError, match="an answer must follow"):
        check_conversation(turns(*roles), ends_open=True)


@pytest.mark.parametrize("text", ["", "  \n\t\u3000"])
def test_a_blank_last_user_turn_is_refused(text):
    with pytest.raises(RoleError, match="blank"):
        check_conversation([Message(role="user", content=text)], ends_open=True)


def test_an_empty_conversation_is_refused():
    with pytest.raises(RoleError, match="no message"):
        check_conversation([], ends_open=True)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Message(role="user", content=3), "content must be text, not int"),
        (Message(role="user", content="a\ud800"), "lone surrogate at character 1"),
        (Message(role="user", content="a", metadata="x\ny"), "one line"),
        (Message(role="user", content="a", metadata=None), "metadata must be text"),
    ],
)
def test_what_is_no_text_is_refused(message, says):
    with pytest.raises(RoleError, match=says):
        check_conversation([message], ends_open=True)


def test_a_surrogate_pair_in_json_is_whole_and_half_of_it_is_not():
    assert lone_surrogate("ok \U0001f600") == -1
    assert lone_surrogate("no \ud83d") == 3


def test_role_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(RoleError(2, "why")))
    assert (error.position, error.reason, str(error)) == (2, "why", "messages[2]: why")
