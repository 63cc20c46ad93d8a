"""The ids of a file's records, laid end to end in files of plain numbers."""

import hashlib
import pickle
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.records.reading import OnError, ReadReport, RecordError, RecordLocation
from glm_rlhf.engine.data.records.schema import (
    DemonstrationRecord,
    PairForm,
    PairRecord,
    PromptRecord,
    read_demonstrations,
    read_pairs,
    read_prompts,
)
from glm_rlhf.engine.data.records.token_ids import answer_ids, prompt_ids
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer

Kind = Literal["prompts", "demonstrations", "pairs"]

ANSWERS = {"prompts": (), "demonstrations": ("response",), "pairs": ("chosen", "rejected")}
"""Names of the answers that a record of each kind has, in the order they are stored."""

FORMAT = 1
"""Raised whenever the same file would be stored otherwise: another layout, another reading or rendering."""

TOKENS, OFFSETS, RECORDS = "tokens.int32", "offsets.int64", "records.int64"
"""Files of a store: all ids; where each prompt and answer starts, and the end; each record's index."""

_PROBE = [
    Message(role="user", content="1 + 1 = ?"),
    Message(role="assistant", content="Two, 二。\n"),
    Message(role="user", content="<|user|> thanks"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is read, and what of it is stored."""

    path: Path
    """The file."""
    kind: Kind
    """What its records are."""
    form: PairForm
    """Form of pairs."""
    vocab_size: int
    """Every id is below it."""
    on_error: OnError
    """What a bad record does."""
    max_prompt_tokens: int
    """Longest prompt, in tokens."""
    max_tokens: int
    """Longest prompt + answer, in tokens."""
    truncates: bool
    """Whether an answer is cut where it would pass `max_tokens`."""

    def __post_init__(self) -> None:
        if self.kind not in ANSWERS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(ANSWERS)}")
        if self.kind != "pairs" and self.form != "pairs":
            raise ValueError(f"form is {self.form!r}, but {self.kind} have only one form; leave it out")
        if self.max_prompt_tokens < 1 or self.max_tokens < 2:
            raise ValueError(
                f"max_prompt_tokens is {self.max_prompt_tokens}, max_tokens is {self.max_tokens}; a prompt "
                "needs at least 1, prompt and answer at least 2"
            )

    def open(self, tokenizer: Tokenizer | None, report: ReadReport) -> "Iterator[StoredRecord]":
        """Return an iterator over the file's records as ids; see `read_json_lines`."""
        then = partial(_entry, source=self, tokenizer=tokenizer)
        common = {"vocab_size": self.vocab_size, "on_error": self.on_error, "report": report, "then": then}
        if self.kind == "pairs":
            return read_pairs(self.path, form=self.form, **common)
        read = read_prompts if self.kind == "prompts" else read_demonstrations
        return read(self.path, **common)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A record as it is stored."""

    index: int
    """Its place among the file's records."""
    parts: list[list[int]]
    """The prompt's ids, then each answer's."""
    num_truncated: int
    """Answers that were cut."""


def write_records(folder: Path, source: Source, tokenizer: Tokenizer | None) -> dict:
    """Write a file's records as ids into `folder`, one at a time, and return what became of them.

    Shows a progress bar where standard error is a terminal.

    Returns:
        The fields of `StoreReport` as JSON values; errors as `[line, reason]`.

    Raises:
        RecordError: a bad file or record, or a file that changed meanwhile. OSError: no room.
    """
    path = source.path
    before = path.stat()
    report = ReadReport()
    offsets, indices, num_truncated = array("q", [0]), array("q"), 0
    with (folder / TOKENS).open("wb") as file:
        bar = tqdm(
            source.open(tokenizer, report), desc=f"tokenise {path.name}", unit=" records", disable=None
        )
        for entry in bar:
            for ids in entry.parts:
                file.write(np.asarray(ids, dtype=np.int32).tobytes())
                offsets.append(offsets[-1] + len(ids))
            indices.append(entry.index)
            num_truncated += entry.num_truncated
    np.frombuffer(offsets, dtype=np.int64).tofile(folder / OFFSETS)
    np.frombuffer(indices, dtype=np.int64).tofile(folder / RECORDS)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise RecordError(path, 0, "changed while it was read; start again when it is complete")
    return {
        "num_records": report.num_records,
        "num_skipped": report.num_skipped,
        "num_blank": report.num_blank,
        "num_truncated": num_truncated,
        "num_tokens": offsets[-1],
        "errors": [[error.line, error.reason] for error in report.errors],
    }


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a checksum of all that decides which ids a text becomes; the same in every process."""
    table, chat = tokenizer.table, tokenizer.chat
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sorted(table.bytes_by_id.items())).encode())
    digest.update(repr(sorted(table.name_by_id.items())).encode())
    digest.update(repr((chat.name, chat.prefix, chat.opening, chat.header, chat.end)).encode())
    # The merges stand in no table, only in the encoder; the form's code shows in what it renders.
    digest.update(pickle.dumps(tokenizer.encode_text, protocol=4))
    digest.update(repr(tokenizer.render_prompt_response(_PROBE, " ok\n")).encode())
    return digest.hexdigest()


def _entry(
    record: PromptRecord | DemonstrationRecord | PairRecord,
    *,
    source: Source,
    tokenizer: Tokenizer | None,
) -> StoredRecord:
    place = record.location
    prompt = prompt_ids(record.prompt, place, tokenizer)
    if len(prompt) > source.max_prompt_tokens:
        raise place.error(
            f"the prompt has {len(prompt)} tokens, max_prompt_tokens allows {source.max_prompt_tokens}"
        )
    room = source.max_tokens - len(prompt)
    if room < 1:
        raise place.error(
            f"the prompt has {len(prompt)} tokens and leaves no room for an answer in a context of "
            f"{source.max_tokens}"
        )
    parts, num_truncated = [prompt], 0
    for name in ANSWERS[source.kind]:
        ids = answer_ids(getattr(record, name), place, tokenizer)
        if len(ids) > room:
            ids = _cut(ids, room, name, place, source)
            num_truncated += 1
        parts.append(ids)
    return StoredRecord(index=place.index, parts=parts, num_truncated=num_truncated)


def _cut(ids: list[int], room: int, name: str, place: RecordLocation, source: Source) -> list[int]:
    if not source.truncates:
        raise place.error(
            f"prompt and {name} have {source.max_tokens - room + len(ids)} tokens, the model's context is "
            f"{source.max_tokens}; shorten them, skip bad records, or let answers be cut"
        )
    return ids[:room]
