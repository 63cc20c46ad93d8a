"""Records tokenised once, kept on disk, mapped into memory by every rank that reads them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from glm_rlhf.engine.data.records.files import check_record_file
from glm_rlhf.engine.data.records.reading import OnError, RecordError
from glm_rlhf.engine.data.records.schema import ANY_ID, PairForm
from glm_rlhf.engine.data.store.build_cache import DamagedFolder, ensure_folder, file_digest, read_folder
from glm_rlhf.engine.data.store.token_writer import (
    ANSWERS,
    FORMAT,
    OFFSETS,
    RECORDS,
    TOKENS,
    Kind,
    Source,
    tokenizer_digest,
    write_records,
)
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """What became of a file's records on their way into a store."""

    num_records: int
    """Records stored."""
    num_skipped: int
    """Bad records left out (`on_error="skip"`), those over a limit of tokens among them."""
    num_blank: int
    """Blank lines, which are no records."""
    num_truncated: int
    """Answers cut at the context's end (`truncates=True`)."""
    num_tokens: int
    """Tokens stored, prompts and answers once each."""
    errors: tuple[RecordError, ...]
    """The first 20 reasons to skip, with file and line."""

    def lines(self) -> list[str]:
        """Return the report for people."""
        parts = [f"{self.num_records} records with {self.num_tokens} tokens"]
        if self.num_truncated:
            parts.append(f"{self.num_truncated} answers cut at the context's end")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} bad records skipped")
        if self.num_blank:
            parts.append(f"{self.num_blank} blank lines")
        more = self.num_skipped - len(self.errors)
        return [
            ", ".join(parts),
            *(f"  skipped: {error}" for error in self.errors),
            *([f"  skipped: {more} more"] if more else []),
        ]

    def as_dict(self) -> dict:
        """Return the report as JSON values."""
        return asdict(self) | {"errors": [str(error) for error in self.errors]}


class TokenStore:
    """The ids of a file's records, as views of arrays that all processes of a machine share.

    Made by `open_store`. Every view is a read-only int32 array that stays valid as long as it is held; torch
    needs a copy (`torch.tensor(view)`), for it has no read-only tensors.
    """

    def __init__(self, folder: Path, kind: Kind, report: StoreReport) -> None:
        self.kind = kind
        self.report = report
        self._answers: tuple[str, ...] = ANSWERS[kind]
        num_parts, num_records = 1 + len(self._answers), report.num_records
        self._tokens = _mapped(folder / TOKENS, np.int32, report.num_tokens)
        self._offsets = _mapped(folder / OFFSETS, np.int64, num_records * num_parts + 1)
        self._records = _mapped(folder / RECORDS, np.int64, num_records)
        self._part_lengths = np.diff(self._offsets).reshape(num_records, num_parts)

    def __len__(self) -> int:
        return self.report.num_records

    def prompt(self, i: int) -> np.ndarray:
        """Return the ids before the answer of record `i`, int32, at least one."""
        return self._part(i, 0)

    def response(self, i: int) -> np.ndarray:
        """Return the ids of the answer to imitate, int32, at least one. Demonstrations only."""
        return self._part(i, self._column("response"))

    def chosen(self, i: int) -> np.ndarray:
        """Return the ids of the preferred answer, int32, at least one. Pairs only."""
        return self._part(i, self._column("chosen"))

    def rejected(self, i: int) -> np.ndarray:
        """Return the ids of the other answer, int32, at least one. Pairs only."""
        return self._part(i, self._column("rejected"))

    def record_index(self, i: int) -> int:
        """Return the place of record `i` among the file's records, from 0; skipped ones count, so it is >= i.

        Outputs carry it as `index`.
        """
        return int(self._records[self._checked(i)])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that record i sends through a model, int64 [n].

        Of a prompt: its own; of a demonstration: prompt + response; of a pair: prompt + chosen and
        prompt + rejected, which are two sequences, so the prompt counts twice.
        """
        return self._part_lengths.sum(1) + (len(self._answers) > 1) * self.prompt_lengths

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt, int64 [n]."""
        return self._part_lengths[:, 0]

    @property
    def response_lengths(self) -> np.ndarray:
        """Tokens of each response, header and end id included, int64 [n]. Demonstrations only."""
        return self._part_lengths[:, self._column("response")]

    @property
    def chosen_lengths(self) -> np.ndarray:
        """Tokens of each preferred answer, header and end id included, int64 [n]. Pairs only."""
        return self._part_lengths[:, self._column("chosen")]

    @property
    def rejected_lengths(self) -> np.ndarray:
        """Tokens of each other answer, header and end id included, int64 [n]. Pairs only."""
        return self._part_lengths[:, self._column("rejected")]

    def _part(self, i: int, column: int) -> np.ndarray:
        first = self._checked(i) * (1 + len(self._answers)) + column
        return self._tokens[self._offsets[first] : self._offsets[first + 1]]

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of a store with {len(self)} records")
        return int(i)

    def _column(self, name: str) -> int:
        if name not in self._answers:
            raise ValueError(f"a store of {self.kind} has no {name}; open the file as another kind")
        return 1 + self._answers.index(name)


def _alone() -> None:
    """Wait for nobody: the barrier of a single process."""


def open_store(
    path: str | Path,
    kind: Kind,
    *,
    folder: str | Path,
    tokenizer: Tokenizer | None,
    max_prompt_tokens: int,
    max_tokens: int,
    vocab_size: int = ANY_ID,
    form: PairForm = "pairs",
    on_error: OnError = "raise",
    truncates: bool = False,
    is_builder: bool = True,
    barrier: Callable[[], object] = _alone,
) -> TokenStore:
    """Return the records of a file as ids, tokenised at the first call and mapped afterwards.

    Arrays lie in a folder whose name follows from the file's content, the tokenizer, the kind, the limits and
    the form's version, so that a changed input is tokenised anew; a damaged folder is rebuilt, see
    `ensure_folder`. Prompts are rendered with the generation prompt and never cut; answers end with the chat
    form's end id, unless they are cut or were given as ids.

    Every rank calls it, and reaches `barrier` exactly once whatever goes wrong with the data; the builder
    writes before it, the others read behind it. A fault of the builder's is an error on all ranks.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file.
        kind: what its records are.
        folder: where arrays are kept, seen by all ranks of a machine; runs may share it, and may build at
            once. It may be removed when no run uses it.
        tokenizer: the model's; None where the records carry ids.
        max_prompt_tokens: longest prompt, in tokens; a longer one is a bad record.
        max_tokens: the model's context, in tokens: prompt + answer may have as many. A prompt that fills it
            leaves no room for an answer and is a bad record.
        vocab_size: rows of the embedding; every id must be below it.
        form: of pairs, see `read_pairs`.
        on_error: `raise` at the first bad record, or `skip` bad records, counted in `report`.
        truncates: cut an answer that would pass `max_tokens`, counted in `report`, in place of taking its
            record for a bad one. It then has no end id.
        is_builder: true on one rank of those that see the same `folder`.
        barrier: returns when every rank has called it; must outwait the tokenising.

    Raises:
        RecordError: a bad file or record, with file and line.
        ValueError: impossible arguments; on the other ranks, that the builder failed.
        OSError: the folder cannot be written.
    """
    source = Source(
        path=Path(path),
        kind=kind,
        form=form,
        vocab_size=vocab_size,
        on_error=on_error,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        truncates=truncates,
    )
    _check_vocabulary(tokenizer, vocab_size)
    fault: Exception | None = None
    try:
        check_record_file(source.path)
        identity = _identity(source, tokenizer)
        name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=12).hexdigest()
        place = Path(folder) / f"{kind}-{name}"
        if is_builder:
            ensure_folder(place, identity, partial(write_records, source=source, tokenizer=tokenizer))
    except (ValueError, OSError) as error:
        fault = error
    barrier()
    if fault is not None:
        raise fault
    try:
        facts = read_folder(place, identity, checks_content=False)
    except DamagedFolder as error:
        raise ValueError(
            f"{error}: the rank that tokenises {path} has failed, see its error; or the ranks do not see the "
            "same files"
        ) from error
    errors = tuple(RecordError(path, line, reason) for line, reason in facts.pop("errors"))
    return TokenStore(place, kind, StoreReport(errors=errors, **facts))


def _identity(source: Source, tokenizer: Tokenizer | None) -> dict:
    """Return what a store's content follows from, as JSON values; not where the file lies."""
    given = asdict(source)
    del given["path"]
    vocabulary = None if tokenizer is None else tokenizer_digest(tokenizer)
    return {"format": FORMAT, "file": file_digest(source.path), "tokenizer": vocabulary, **given}


def _check_vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> None:
    if not 1 <= vocab_size <= ANY_ID:
        raise ValueError(f"vocab_size is {vocab_size}; it must be from 1 to {ANY_ID}")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding only {vocab_size} rows; "
            "they do not belong together"
        )


def _mapped(path: Path, dtype: type, count: int) -> np.ndarray:
    # As a plain array, because slices of np.memmap itself are several times slower to make.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))
