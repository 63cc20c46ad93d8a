"""Writes the ids of a file's records, concatenated, to files of raw numbers."""

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
from glm_rlhf.parallel.storage.durable_io import name_in_errors, write_synced

Kind = Literal["prompts", "demonstrations", "pairs"]

ANSWERS = {"prompts": (), "demonstrations": ("response",), "pairs": ("chosen", "rejected")}
"""Kind of records → names of their answers, in storage order."""

FORMAT = 2
"""Format version, raised when the same file would be stored differently: by layout, reading or rendering."""

TOKENS, OFFSETS, RECORDS = "tokens.int32", "offsets.int64", "records.int64"
"""Files of a store: all ids; the offset of each prompt and answer, and the end; the index of each record."""

_PROBE = [
    Message(role="user", content="1 + 1 = ?"),
    Message(role="assistant", content="Two, 二。\n"),
    Message(role="user", content="<|user|> thanks"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The file to read, and the checks and limits of its records."""

    path: Path
    """The file."""
    kind: Kind
    """Kind of its records."""
    form: PairForm
    """Form of pairs."""
    vocab_size: int
    """Upper bound of ids, exclusive."""
    on_error: OnError
    """Whether a bad record raises or is skipped."""
    max_prompt_tokens: int
    """Longest prompt, in tokens."""
    max_tokens: int
    """Longest prompt + answer, in tokens."""
    truncates: bool
    """Whether an answer beyond `max_tokens` is truncated."""

    def __post_init__(self) -> None:
        if self.kind not in ANSWERS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(ANSWERS)}")
        if self.kind != "pairs" and self.form != "pairs":
            raise ValueError(f"form is {self.form!r}, but {self.kind} have only one form; omit it")
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
    """A record in its stored form."""

    index: int
    """Its index in the file."""
    parts: list[list[int]]
    """Ids of the prompt, then of each answer."""
    num_truncated: int
    """Number of truncated answers."""


def write_records(folder: Path, source: Source, tokenizer: Tokenizer | None) -> dict:
    """Write a file's records as ids into `folder`, one at a time, and return their counts.

    Shows a progress bar if stderr is a terminal.

    Returns:
        The fields of `StoreReport` as JSON values; errors as `[line, reason]`.

    Raises:
        RecordError: a bad file or record, or a file that changed during reading. OSError: the disk is full;
            the error names the file.
    """
    path = source.path
    before = path.stat()
    report = ReadReport()
    offsets, indices, num_truncated = array("q", [0]), array("q"), 0
    with name_in_errors(folder / TOKENS), (folder / TOKENS).open("wb") as file:
        bar = tqdm(
            source.open(tokenizer, report), desc=f"tokenise {path.name}", unit=" records", disable=None
        )
        for entry in bar:
            for ids in entry.parts:
                file.write(np.asarray(ids, dtype=np.int32).tobytes())
                offsets.append(offsets[-1] + len(ids))
            indices.append(entry.index)
            num_truncated += entry.num_truncated
    write_synced(folder / OFFSETS, offsets.tobytes())
    write_synced(folder / RECORDS, indices.tobytes())
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise RecordError(path, 0, "changed while it was read; run again when it is complete")
    return {
        "num_records": report.num_records,
        "num_skipped": report.num_skipped,
        "num_blank": report.num_blank,
        "num_truncated": num_truncated,
        "num_tokens": offsets[-1],
        "errors": [[error.line, error.reason] for error in report.errors],
    }


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a checksum of everything that determines the ids of a text; the same in every process."""
    table, chat = tokenizer.table, tokenizer.chat
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sorted(table.bytes_by_id.items())).encode())
    digest.update(repr(sorted(table.name_by_id.items())).encode())
    digest.update(repr((chat.name, chat.prefix, chat.opening, chat.header, chat.end)).encode())
    # The encoder holds the merges, which are in no table; a rendered probe covers the chat format's code.
    digest.update(pickle.dumps(tokenizer.encode_text, protocol=4))
    digest.update(repr(tokenizer.render_prompt_response(_PROBE, " ok\n")).encode())
    return digest.hexdigest()


def _entry(
    record: PromptRecord | DemonstrationRecord | PairRecord,
    *,
    source: Source,
    tokenizer: Tokenizer | None,
) -> StoredRecord:
    location = record.location
    prompt = prompt_ids(record.prompt, location, tokenizer)
    if len(prompt) > source.max_prompt_tokens:
        raise location.error(
            f"the prompt has {len(prompt)} tokens, max_prompt_tokens allows {source.max_prompt_tokens}"
        )
    room = source.max_tokens - len(prompt)
    if room < 1:
        raise location.error(
            f"the prompt has {len(prompt)} tokens and leaves no room for an answer in a context of "
            f"{source.max_tokens}"
        )
    parts, num_truncated = [prompt], 0
    for name in ANSWERS[source.kind]:
        ids = answer_ids(getattr(record, name), location, tokenizer)
        if len(ids) > room:
            ids = _cut(ids, room, name, location, source)
            num_truncated += 1
        parts.append(ids)
    return StoredRecord(index=location.index, parts=parts, num_truncated=num_truncated)


def _cut(ids: list[int], room: int, name: str, location: RecordLocation, source: Source) -> list[int]:
    if not source.truncates:
        raise location.error(
            f"prompt and {name} have {source.max_tokens - room + len(ids)} tokens, the model's context is "
            f"{source.max_tokens}; shorten them, skip bad records, or let answers be cut"
        )
    return ids[:room]
