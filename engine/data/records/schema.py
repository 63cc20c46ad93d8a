"""Prompts, demonstrations and preference pairs, read from a file and checked."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from glm_rlhf.engine.data.messages import Message, RoleError, check_conversation, lone_surrogate
from glm_rlhf.engine.data.records.files import read_record_file
from glm_rlhf.engine.data.records.hh_rlhf import split_dialogue_pair
from glm_rlhf.engine.data.records.jsonl import DEFAULT_MAX_LINE_BYTES, json_type
from glm_rlhf.engine.data.records.reading import OnError, ReadReport, RecordLocation

PairForm = Literal["pairs", "hh-rlhf"]
Result = TypeVar("Result")

ANY_ID = 2**31
"""A vocabulary size for readers that do not know the model's: any id an int32 holds."""


def _as_it_is(record: Result) -> Result:
    return record


_PROMPT_KEYS = ("prompt", "messages", "prompt_tokens")
_MESSAGE_KEYS = {"role", "content", "metadata"}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids given in place of a text; they are used as they are, no template and no end id is added."""

    ids: tuple[int, ...]
    """Token ids, at least one, each in [0, vocabulary size)."""


Prompt = tuple[Message, ...] | TokenIds
"""A conversation that an answer is to follow, or its ids."""
Answer = str | TokenIds
"""An answer's text, which may be empty, or its ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """A prompt to be answered."""

    location: RecordLocation
    """File, line and index of the record."""
    prompt: Prompt
    """What is to be answered."""
    extra: Mapping[str, object]
    """All further fields of the record, as parsed; a rule reward gets them by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationRecord:
    """A prompt with the answer to imitate."""

    location: RecordLocation
    """File, line and index of the record."""
    prompt: Prompt
    """What is answered."""
    response: Answer
    """The answer."""
    extra: Mapping[str, object]
    """All further fields of the record, as parsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """A prompt with two answers, one preferred to the other. They may be equal: hygiene is a later step."""

    location: RecordLocation
    """File, line and index of the record."""
    prompt: Prompt
    """What is answered."""
    chosen: Answer
    """The preferred answer."""
    rejected: Answer
    """The other answer."""
    extra: Mapping[str, object]
    """All further fields of the record, as parsed."""


def read_prompts(
    path: str | Path,
    *,
    vocab_size: int = ANY_ID,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
    then: Callable[[PromptRecord], Result] = _as_it_is,
) -> Iterator[Result]:
    """Return an iterator over the prompts of a file; `read_record_file` says what it may be.

    A record holds exactly one of
    - `prompt`: a text, which is one user's turn; not blank,
    - `messages`: a list of `{"role", "content"}` and, optionally, `"metadata"`; see `check_conversation`,
    - `prompt_tokens`: a list of ids, used as they are.

    Every other field is kept in `extra`.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file.
        vocab_size: ids given in place of a text must be below it.
        on_error: `raise` at the first bad record, or `skip` bad records, counting them.
        max_line_bytes: longest line of JSON accepted, in bytes.
        report: filled while reading; a new one for each file.
        then: makes of a record what is handed out; a `RecordError` of it makes the record a bad one.

    Raises:
        RecordError: with file and line; at once for a file that cannot be read, else while iterating.
    """

    def parse(fields: dict, place: RecordLocation) -> Result:
        return then(_prompt_record(fields, place, vocab_size=vocab_size))

    return read_record_file(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def read_demonstrations(
    path: str | Path,
    *,
    vocab_size: int = ANY_ID,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
    then: Callable[[DemonstrationRecord], Result] = _as_it_is,
) -> Iterator[Result]:
    """Return an iterator over the demonstrations of a file.

    A record is a prompt (see `read_prompts`, where the arguments are explained too) and exactly one of
    `response`, a text which may be empty, and `response_tokens`, a list of ids which may not.

    Raises:
        RecordError: as `read_prompts`.
    """

    def parse(fields: dict, place: RecordLocation) -> Result:
        return then(_demonstration_record(fields, place, vocab_size=vocab_size))

    return read_record_file(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def read_pairs(
    path: str | Path,
    *,
    form: PairForm = "pairs",
    vocab_size: int = ANY_ID,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
    then: Callable[[PairRecord], Result] = _as_it_is,
) -> Iterator[Result]:
    """Return an iterator over the preference pairs of a file.

    A record is a prompt (see `read_prompts`, where the other arguments are explained too), exactly one of
    `chosen` and `chosen_tokens`, and exactly one of `rejected` and `rejected_tokens`.

    Args:
        form: `pairs` as above, or `hh-rlhf`: `chosen` and `rejected` are whole dialogues and there is no
            prompt; see `split_dialogue_pair`.

    Raises:
        RecordError: as `read_prompts`. ValueError: an unknown form.
    """
    parsers = {"pairs": partial(_pair_record, vocab_size=vocab_size), "hh-rlhf": _hh_rlhf_record}
    if form not in parsers:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(parsers)}")

    def parse(fields: dict, place: RecordLocation) -> Result:
        return then(parsers[form](fields, place))

    return read_record_file(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def _prompt_record(fields: dict, place: RecordLocation, *, vocab_size: int) -> PromptRecord:
    prompt = _take_prompt(fields, place, vocab_size)
    return PromptRecord(location=place, prompt=prompt, extra=fields)


def _demonstration_record(fields: dict, place: RecordLocation, *, vocab_size: int) -> DemonstrationRecord:
    prompt = _take_prompt(fields, place, vocab_size)
    response = _take_answer(fields, place, "response", vocab_size)
    return DemonstrationRecord(location=place, prompt=prompt, response=response, extra=fields)


def _pair_record(fields: dict, place: RecordLocation, *, vocab_size: int) -> PairRecord:
    prompt = _take_prompt(fields, place, vocab_size)
    chosen = _take_answer(fields, place, "chosen", vocab_size)
    rejected = _take_answer(fields, place, "rejected", vocab_size)
    return PairRecord(location=place, prompt=prompt, chosen=chosen, rejected=rejected, extra=fields)


def _hh_rlhf_record(fields: dict, place: RecordLocation) -> PairRecord:
    given = [key for key in _PROMPT_KEYS if key in fields]
    if given:
        raise place.error(
            f"{given[0]!r} is given, but hh-rlhf's dialogues hold their prompt; read it as form=pairs"
        )
    dialogues = [_text(fields.pop(name, None), place, name) for name in ("chosen", "rejected")]
    try:
        messages, chosen, rejected = split_dialogue_pair(*dialogues)
        check_conversation(messages, ends_open=True)
    except ValueError as error:
        raise place.error(str(error)) from error
    return PairRecord(location=place, prompt=messages, chosen=chosen, rejected=rejected, extra=fields)


def _take_prompt(fields: dict, place: RecordLocation, vocab_size: int) -> Prompt:
    name = _one_of(fields, place, _PROMPT_KEYS)
    value = fields.pop(name)
    if name == "prompt_tokens":
        return _token_ids(value, place, name, vocab_size)
    if name == "prompt":
        hint = "; give turns as 'messages', ids as 'prompt_tokens'" if isinstance(value, list) else ""
        text = _text(value, place, name, hint)
        if not text.strip():
            raise place.error("'prompt' is blank; it must hold some text")
        return (Message(role="user", content=text),)
    return _messages(value, place)


def _messages(value: object, place: RecordLocation) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise place.error(f"'messages' must be a list of turns, not {json_type(value)}")
    messages = []
    for position, turn in enumerate(value):
        where = f"messages[{position}]"
        if not isinstance(turn, dict):
            raise place.error(f"{where} must be an object with role and content, not {json_type(turn)}")
        unknown = sorted(turn.keys() - _MESSAGE_KEYS)
        if unknown:
            raise place.error(
                f"{where} has the unknown field {unknown[0]!r}; a turn has role, content, metadata"
            )
        role = _text(turn.get("role"), place, f"{where}.role")
        content = _text(turn.get("content"), place, f"{where}.content")
        metadata = _text(turn.get("metadata", ""), place, f"{where}.metadata")
        messages.append(Message(role=role, content=content, metadata=metadata))
    try:
        check_conversation(messages, ends_open=True)
    except RoleError as error:
        raise place.error(str(error)) from error
    return tuple(messages)


def _take_answer(fields: dict, place: RecordLocation, key: str, vocab_size: int) -> Answer:
    name = _one_of(fields, place, (key, f"{key}_tokens"))
    value = fields.pop(name)
    return _text(value, place, name) if name == key else _token_ids(value, place, name, vocab_size)


def _one_of(fields: dict, place: RecordLocation, names: tuple[str, ...]) -> str:
    given = [name for name in names if name in fields]
    if len(given) == 1:
        return given[0]
    wanted = " or ".join(map(repr, names))
    if given:
        raise place.error(
            f"{' and '.join(map(repr, given))} are both given; exactly one of {wanted} is required"
        )
    present = ", ".join(sorted(map(repr, fields))) or "none"  # a prompt that was found is not among them
    raise place.error(f"there is no {wanted}; other fields of the record: {present}")


def _text(value: object, place: RecordLocation, name: str, hint: str = "") -> str:
    if not isinstance(value, str):
        raise place.error(f"'{name}' must be a text, not {json_type(value)}{hint}")
    position = lone_surrogate(value)
    if position >= 0:
        raise place.error(f"'{name}' holds a lone surrogate at character {position}; mend its \\u escape")
    return value


def _token_ids(value: object, place: RecordLocation, name: str, vocab_size: int) -> TokenIds:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else json_type(value)
        raise place.error(f"'{name}' must be a list of at least one token id, not {found}")
    for position, token in enumerate(value):
        if type(token) is not int:
            raise place.error(
                f"{name}[{position}] must be a whole number, not {json_type(token)}: {token!r:.40}"
            )
        if not 0 <= token < vocab_size:
            raise place.error(f"{name}[{position}] is {token}; ids go from 0 to {vocab_size - 1}")
    return TokenIds(tuple(value))
