"""The turns of a conversation, and the check of their order."""

from collections.abc import Sequence
from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "observation")

_MAY_OPEN = ("system", "user")
_MAY_FOLLOW = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "observation"),
    "observation": ("assistant",),
}


class RoleError(ValueError):
    """A conversation whose turns cannot be rendered; `position` is the 0-based index of the bad turn."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"messages[{position}]: {reason}")
        self.position = position
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.position, self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of `ROLES`. `observation` is the result of a tool."""
    content: str
    """Text of the turn. Role markers in it are ordinary characters."""
    metadata: str = ""
    """Text on the line of the role marker: the name of the tool that an assistant turn calls; else empty."""


def lone_surrogate(text: str) -> int:
    """Return the 0-based index of the first character that UTF-8 cannot encode, or -1.

    Such characters (single surrogates U+D800..U+DFFF) come from broken escapes such as `"\\ud83d"` in JSON.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return -1


def check_conversation(messages: Sequence[Message], *, ends_open: bool) -> None:
    """Check that the turns can be rendered.

    The order: at most one system turn, which comes first; then user and assistant turns alternate. An
    observation follows an assistant turn and precedes one. An assistant turn with metadata (a tool call) may
    follow another assistant turn, as ChatGLM3 writes a thought and then a call.

    Args:
        messages: the turns, oldest first; at least one.
        ends_open: whether an answer follows: the last turn must then be a user turn or an observation.

    Raises:
        RoleError: an empty conversation, an unknown role, content or metadata that is not text, a role out
            of order, a blank last user turn, or (with `ends_open`) an assistant or system turn at the end.
            It names the first invalid turn.
    """
    if not messages:
        raise RoleError(0, "there is no message; at least one user turn is required")
    for position, message in enumerate(messages):
        _check_message(position, message)
        if position == 0:
            if message.role not in _MAY_OPEN:
                raise RoleError(
                    0, f"a conversation cannot open with {message.role!r}; begin with system or user"
                )
            continue
        before = messages[position - 1].role
        is_call_after_thought = before == message.role == "assistant" and message.metadata != ""
        if message.role not in _MAY_FOLLOW[before] and not is_call_after_thought:
            allowed = " or ".join(_MAY_FOLLOW[before])
            raise RoleError(position, f"{message.role!r} cannot follow {before!r}; expected {allowed}")
    last = messages[-1]
    if ends_open and last.role not in ("user", "observation"):
        raise RoleError(
            len(messages) - 1,
            f"the last turn is {last.role!r}, but an answer must follow; end with user or observation "
            "(the last assistant turn belongs in the record's answer)",
        )
    if last.role == "user" and not last.content.strip():
        raise RoleError(len(messages) - 1, "the last user turn is blank; it must hold some text")


def _check_message(position: int, message: Message) -> None:
    if message.role not in ROLES:
        raise RoleError(position, f"unknown role {message.role!r}; known roles are {', '.join(ROLES)}")
    for name, text in (("content", message.content), ("metadata", message.metadata)):
        if not isinstance(text, str):
            raise RoleError(position, f"{name} must be text, not {type(text).__name__}")
        index = lone_surrogate(text)
        if index >= 0:
            raise RoleError(
                position, f"{name} holds a lone surrogate at character {index}; fix its \\u escape"
            )
    if "\n" in message.metadata:
        raise RoleError(position, "metadata must be one line, because a line break ends it in the prompt")
