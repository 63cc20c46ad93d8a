"""Reads and validates prompts, demonstrations and preference pairs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from glm_rlhf.engine.data.messages import Message, RoleError, check_conversation
from glm_rlhf.engine.data.records.files import read_record_file
from glm_rlhf.engine.data.records.hh_rlhf import split_dialogue_pair
from glm_rlhf.engine.data.records.jsonl import DEFAULT_MAX_LINE_BYTES, json_type
from glm_rlhf.engine.data.records.reading import OnError, ReadReport, RecordLocation
from glm_rlhf.engine.data.records.turns import (
    CONTEXT_FIELDS,
    check_context,
    text_of,
    turns_of,
    with_context,
)

PairForm = Literal["pairs", "hh-rlhf"]
Result = TypeVar("Result")

ANY_ID = 2**31
"""Vocabulary size for readers that do not know the model's: allows any id that fits an int32."""


def _identity(record: Result) -> Result:
    return record


_PROMPT_KEYS = ("prompt", "messages", "prompt_tokens")


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids that a record gives instead of a text; used unchanged, without template or end id."""

    ids: tuple[int, ...]
    """Token ids, at least one, each in [0, vocabulary size)."""


Prompt = tuple[Message, ...] | TokenIds
"""A conversation to answer, or its ids."""
Answer = str | TokenIds
"""The text of an answer, which may be empty, or its ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """A prompt to answer."""

    location: RecordLocation
    """File, line and index of the record."""
    prompt: Prompt
    """The prompt."""
    extra: Mapping[str, object]
    """All other fields of the record, as parsed; passed to the reward function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationRecord:
    """A prompt with the answer to train on."""

    location: RecordLocation
    """File, line and index of the record."""
    prompt: Prompt
    """The prompt."""
    response: Answer
    """The answer."""
    extra: Mapping[str, object]
    """All other fields of the record, as parsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """A prompt with two answers, one preferred to the other; they may be equal, `cleaning` drops those."""

    location: RecordLocation
    """File, line and index of the record."""
    prompt: Prompt
    """The prompt."""
    chosen: Answer
    """The preferred answer."""
    rejected: Answer
    """The other answer."""
    extra: Mapping[str, object]
    """All other fields of the record, as parsed."""


def read_prompts(
    path: str | Path,
    *,
    vocab_size: int = ANY_ID,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
    then: Callable[[PromptRecord], Result] = _identity,
) -> Iterator[Result]:
    """Return an iterator over the prompts of a file; see `read_record_file` for its formats.

    A record holds exactly one of
    - `prompt`: a text, which is one user turn; not blank,
    - `messages`: a list of `{"role", "content"}` and, optionally, `"metadata"`; see `check_conversation`,
    - `prompt_tokens`: a list of ids, used unchanged.

    Beside a `prompt` or `messages`, `system` and `history` are turns before them, see `with_context`; fields
    that are part of the prompt elsewhere and have no plain meaning here are errors. All fields but the prompt
    are kept in `extra`.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file.
        vocab_size: upper bound, exclusive, of ids in the file.
        on_error: `raise` at the first bad record, or `skip` and count bad records.
        max_line_bytes: longest line of JSON, in bytes.
        report: filled while reading; a new one for each file.
        then: converts each record before it is returned; its `RecordError` makes the record a bad one.

    Raises:
        RecordError: with file and line; by the call for a file that cannot be read, else during iteration.
    """

    def parse(fields: dict, location: RecordLocation) -> Result:
        return then(_prompt_record(fields, location, vocab_size=vocab_size))

    return read_record_file(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def read_demonstrations(
    path: str | Path,
    *,
    vocab_size: int = ANY_ID,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
    then: Callable[[DemonstrationRecord], Result] = _identity,
) -> Iterator[Result]:
    """Return an iterator over the demonstrations of a file.

    A record is a prompt (see `read_prompts`, also for the arguments) and exactly one of `response`, a text
    that may be empty, and `response_tokens`, a list of ids that may not be empty.

    Raises:
        RecordError: as `read_prompts`.
    """

    def parse(fields: dict, location: RecordLocation) -> Result:
        return then(_demonstration_record(fields, location, vocab_size=vocab_size))

    return read_record_file(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def read_pairs(
    path: str | Path,
    *,
    form: PairForm = "pairs",
    vocab_size: int = ANY_ID,
    on_error: OnError = "raise",
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    report: ReadReport | None = None,
    then: Callable[[PairRecord], Result] = _identity,
) -> Iterator[Result]:
    """Return an iterator over the preference pairs of a file.

    A record is a prompt (see `read_prompts`, also for the other arguments), exactly one of `chosen` and
    `chosen_tokens`, and exactly one of `rejected` and `rejected_tokens`.

    Args:
        form: `pairs` as above, or `hh-rlhf`: `chosen` and `rejected` are whole dialogues without a separate
            prompt; see `split_dialogue_pair`.

    Raises:
        RecordError: as `read_prompts`. ValueError: an unknown form.
    """
    parsers = {"pairs": partial(_pair_record, vocab_size=vocab_size), "hh-rlhf": _hh_rlhf_record}
    if form not in parsers:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(parsers)}")

    def parse(fields: dict, location: RecordLocation) -> Result:
        return then(parsers[form](fields, location))

    return read_record_file(path, parse, on_error=on_error, max_line_bytes=max_line_bytes, report=report)


def _prompt_record(fields: dict, location: RecordLocation, *, vocab_size: int) -> PromptRecord:
    prompt = _take_prompt(fields, location, vocab_size)
    return PromptRecord(location=location, prompt=prompt, extra=fields)


def _demonstration_record(fields: dict, location: RecordLocation, *, vocab_size: int) -> DemonstrationRecord:
    prompt = _take_prompt(fields, location, vocab_size)
    response = _take_answer(fields, location, "response", vocab_size)
    return DemonstrationRecord(location=location, prompt=prompt, response=response, extra=fields)


def _pair_record(fields: dict, location: RecordLocation, *, vocab_size: int) -> PairRecord:
    prompt = _take_prompt(fields, location, vocab_size)
    chosen = _take_answer(fields, location, "chosen", vocab_size)
    rejected = _take_answer(fields, location, "rejected", vocab_size)
    return PairRecord(location=location, prompt=prompt, chosen=chosen, rejected=rejected, extra=fields)


def _hh_rlhf_record(fields: dict, location: RecordLocation) -> PairRecord:
    prompt_keys = [key for key in _PROMPT_KEYS if key in fields]
    if prompt_keys:
        raise location.error(
            f"{prompt_keys[0]!r} is given, but hh-rlhf's dialogues hold their prompt; read it as form=pairs"
        )
    check_context(
        fields, location, CONTEXT_FIELDS, "belongs to the prompt, and hh-rlhf's dialogues hold theirs"
    )
    dialogues = [text_of(fields.pop(name, None), location, name) for name in ("chosen", "rejected")]
    try:
        messages, chosen, rejected = split_dialogue_pair(*dialogues)
        check_conversation(messages, ends_open=True)
    except ValueError as error:
        raise location.error(str(error)) from error
    return PairRecord(location=location, prompt=messages, chosen=chosen, rejected=rejected, extra=fields)


def _take_prompt(fields: dict, location: RecordLocation, vocab_size: int) -> Prompt:
    name = _one_of(fields, location, _PROMPT_KEYS)
    value = fields.pop(name)
    if name == "prompt_tokens":
        return _token_ids(value, location, name, vocab_size)
    if name == "prompt":
        hint = "; give turns as 'messages', ids as 'prompt_tokens'" if isinstance(value, list) else ""
        text = text_of(value, location, name, hint)
        if not text.strip():
            raise location.error("'prompt' is blank; it must hold some text")
        turns = [Message(role="user", content=text)]
    else:
        turns = turns_of(value, location)
    messages = with_context(turns, fields, location)
    try:
        check_conversation(messages, ends_open=True)
    except RoleError as error:
        is_own = len(messages) == len(turns)
        raise location.error(
            str(error) if is_own else f"with 'system' and 'history' before it, {error}"
        ) from error
    return tuple(messages)


def _take_answer(fields: dict, location: RecordLocation, key: str, vocab_size: int) -> Answer:
    name = _one_of(fields, location, (key, f"{key}_tokens"))
    value = fields.pop(name)
    return text_of(value, location, name) if name == key else _token_ids(value, location, name, vocab_size)


def _one_of(fields: dict, location: RecordLocation, names: tuple[str, ...]) -> str:
    present = [name for name in names if name in fields]
    if len(present) == 1:
        return present[0]
    required = " or ".join(map(repr, names))
    if present:
        raise location.error(
            f"{' and '.join(map(repr, present))} are both given; exactly one of {required} is required"
        )
    others = ", ".join(sorted(map(repr, fields))) or "none"  # without fields that were taken before
    raise location.error(f"there is no {required}; other fields of the record: {others:.400}")


def _token_ids(value: object, location: RecordLocation, name: str, vocab_size: int) -> TokenIds:
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else json_type(value)
        raise location.error(f"'{name}' must be a list of at least one token id, not {kind}")
    for position, token in enumerate(value):
        if type(token) is not int:
            raise location.error(
                f"{name}[{position}] must be a whole number, not {json_type(token)}: {token!r:.40}"
            )
        if not 0 <= token < vocab_size:
            raise location.error(f"{name}[{position}] is {token}; ids go from 0 to {vocab_size - 1}")
    return TokenIds(tuple(value))
