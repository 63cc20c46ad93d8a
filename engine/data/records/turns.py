"""The turns of a record's prompt: its own text or messages, and the fields that put others before them."""

from collections.abc import Mapping

from glm_rlhf.engine.data.messages import Message, lone_surrogate
from glm_rlhf.engine.data.records.jsonl import json_type
from glm_rlhf.engine.data.records.reading import RecordLocation

CONTEXT_FIELDS = ("system", "history")
"""Fields beside the prompt that are turns before it."""

_NOT_PLAIN = ("tools", "functions", "input", "images")
"""Fields that belong to the prompt in data of other programs, each of which writes them in its own way."""

_KEYS = {"role", "content", "metadata"}


def with_context(
    turns: list[Message], fields: Mapping[str, object], location: RecordLocation
) -> list[Message]:
    """Return the turns of a prompt after those that `system` and `history` of its record put before them.

    `system` is the text of a system turn. `history` is a list of earlier turns, each round a list
    `[question, answer]` or each turn an object with role and content. A field that is null or empty says
    nothing.

    Args:
        turns: of `prompt` or `messages`.
        fields: the others of the record; they stay there for the reward function.
        location: of the record, for errors.

    Raises:
        RecordError: a field of another form, a second system turn, or a field that is part of the prompt
            elsewhere and has no plain meaning here (`tools`, `input`, …).
    """
    check_context(fields, location, _NOT_PLAIN, "is part of the prompt in other programs' data")
    opening = [turns[0]] if turns and turns[0].role == "system" else []
    system = fields.get("system")
    if not _says_nothing(system):
        if opening:
            raise location.error("'system' is given, and messages[0] is a system turn too; keep one of them")
        opening = [Message(role="system", content=text_of(system, location, "system"))]
        rest = turns
    else:
        rest = turns[len(opening) :]
    return [*opening, *_history(fields.get("history"), location), *rest]


def check_context(
    fields: Mapping[str, object], location: RecordLocation, names: tuple[str, ...], why: str
) -> None:
    """Check that none of the fields `names` says anything.

    Raises:
        RecordError: one does; the message says `why` it may not.
    """
    for name in names:
        if not _says_nothing(fields.get(name)):
            raise location.error(
                f"{name!r} is given, which {why}: write it into the prompt's text or turns, or rename it if "
                "only a reward function reads it"
            )


def _says_nothing(value: object) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def _history(value: object, location: RecordLocation) -> list[Message]:
    if _says_nothing(value):
        return []
    if not isinstance(value, list):
        raise location.error(f"'history' must be a list of rounds or turns, not {json_type(value)}")
    turns: list[Message] = []
    for position, entry in enumerate(value):
        where = f"history[{position}]"
        if isinstance(entry, list):
            if len(entry) != 2:
                raise location.error(f"{where} has {len(entry)} entries; [question, answer] is required")
            for role, text in zip(("user", "assistant"), entry, strict=True):
                turns.append(Message(role=role, content=text_of(text, location, f"{where} ({role})")))
        else:
            turns.append(turn_of(entry, location, where))
    return turns


def turns_of(value: object, location: RecordLocation) -> list[Message]:
    """Return the turns in a record's `messages`.

    Raises:
        RecordError: not a list of objects with role, content and, optionally, metadata.
    """
    if not isinstance(value, list):
        raise location.error(f"'messages' must be a list of turns, not {json_type(value)}")
    return [turn_of(turn, location, f"messages[{position}]") for position, turn in enumerate(value)]


def turn_of(turn: object, location: RecordLocation, where: str) -> Message:
    """Return one turn; `where` names it in errors."""
    if not isinstance(turn, dict):
        raise location.error(f"{where} must be an object with role and content, not {json_type(turn)}")
    unknown = sorted(turn.keys() - _KEYS)
    if unknown:
        raise location.error(
            f"{where} has the unknown field {unknown[0]!r:.80}; a turn has role, content, metadata"
        )
    return Message(
        role=text_of(turn.get("role"), location, f"{where}.role"),
        content=text_of(turn.get("content"), location, f"{where}.content"),
        metadata=text_of(turn.get("metadata", ""), location, f"{where}.metadata"),
    )


def text_of(value: object, location: RecordLocation, name: str, hint: str = "") -> str:
    """Return a field's value, a text that UTF-8 can hold; `hint` ends the error of another type."""
    if not isinstance(value, str):
        raise location.error(f"'{name}' must be a text, not {json_type(value)}{hint}")
    position = lone_surrogate(value)
    if position >= 0:
        raise location.error(f"'{name}' holds a lone surrogate at character {position}; fix its \\u escape")
    return value
