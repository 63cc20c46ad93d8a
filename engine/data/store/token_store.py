"""A store of records as token ids: tokenised once, kept on disk, memory-mapped by all ranks."""

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
from glm_rlhf.engine.data.store.build_cache import (
    DamagedFolder,
    ensure_folder,
    file_digest,
    read_folder,
    stored_digests,
)
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
    """Counts of a file's records when they are stored."""

    num_records: int
    """Records stored."""
    num_skipped: int
    """Bad records skipped (`on_error="skip"`), including those over a limit of tokens."""
    num_blank: int
    """Blank lines, which are not records."""
    num_truncated: int
    """Answers truncated at `max_tokens` (`truncates=True`)."""
    num_tokens: int
    """Tokens stored; each prompt and answer counts once."""
    errors: tuple[RecordError, ...]
    """The first 20 errors of skipped records, with file and line."""

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        parts = [f"{self.num_records} records with {self.num_tokens} tokens"]
        if self.num_truncated:
            parts.append(f"{self.num_truncated} answers truncated")
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

    Made by `open_store`. A view is a read-only int32 array and stays valid while it is referenced; torch has
    no read-only tensors and needs a copy (`torch.tensor(view)`).
    """

    def __init__(self, folder: Path, kind: Kind, report: StoreReport) -> None:
        self.kind = kind
        self.report = report
        parts = ":".join((kind, *stored_digests(folder, (TOKENS, OFFSETS))))
        self.digest = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
        """Checksum of the ids of all records, in order."""
        self._answers: tuple[str, ...] = ANSWERS[kind]
        num_parts, num_records = 1 + len(self._answers), report.num_records
        self._tokens = _mapped(folder / TOKENS, np.int32, report.num_tokens)
        self._offsets = _mapped(folder / OFFSETS, np.int64, num_records * num_parts + 1)
        self._records = _mapped(folder / RECORDS, np.int64, num_records)
        self._part_lengths = np.diff(self._offsets).reshape(num_records, num_parts)

    def __len__(self) -> int:
        return self.report.num_records

    def prompt(self, i: int) -> np.ndarray:
        """Return the ids of the prompt of record `i`, int32, at least one."""
        return self._part(i, 0)

    def response(self, i: int) -> np.ndarray:
        """Return the ids of the answer, int32, at least one. Demonstrations only."""
        return self._part(i, self._column("response"))

    def chosen(self, i: int) -> np.ndarray:
        """Return the ids of the preferred answer, int32, at least one. Pairs only."""
        return self._part(i, self._column("chosen"))

    def rejected(self, i: int) -> np.ndarray:
        """Return the ids of the rejected answer, int32, at least one. Pairs only."""
        return self._part(i, self._column("rejected"))

    def record_index(self, i: int) -> int:
        """Return the index of record `i` in the file, from 0; skipped records count, so it is >= i.

        Output files hold it as `index`.
        """
        return int(self._records[self._checked(i)])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each record over all its sequences, int64 [n].

        Prompts: the prompt; demonstrations: prompt + response; pairs: prompt + chosen and prompt + rejected,
        which are two sequences, so the prompt counts twice.
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
        """Tokens of each rejected answer, header and end id included, int64 [n]. Pairs only."""
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


def _no_barrier() -> None:
    """Do nothing: the barrier of a single process."""


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
    barrier: Callable[[], object] = _no_barrier,
) -> TokenStore:
    """Return the records of a file as ids, tokenised by the first call and memory-mapped afterwards.

    The arrays are in a folder whose name depends on the file's content, the tokenizer, the kind, the limits
    and the format version, so that a changed input is tokenised again; a damaged folder is rebuilt, see
    `ensure_folder`. Prompts are rendered with the generation prompt and never truncated; answers end with the
    chat format's end id, unless they are truncated or the record gives ids.

    Every rank calls this and reaches `barrier` exactly once, whatever is wrong with the data: the builder
    writes before it, the other ranks read after it. If the builder fails, all ranks raise.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file.
        kind: kind of its records.
        folder: folder of the arrays, visible to all ranks of a machine. Runs may share it, and may build
            concurrently. It may be removed when no run uses it.
        tokenizer: of the model; None if the records give ids.
        max_prompt_tokens: longest prompt, in tokens; a record with a longer one is bad.
        max_tokens: longest prompt + answer, in tokens. A record whose prompt leaves no room for an answer is
            bad.
        vocab_size: rows of the embedding; every id must be below it.
        form: of pairs, see `read_pairs`.
        on_error: `raise` at the first bad record, or `skip` bad records, counted in `report`.
        truncates: truncate an answer beyond `max_tokens`, without end id and counted in `report`; otherwise
            its record is bad.
        is_builder: true on exactly one of the ranks that see the same `folder`.
        barrier: returns when all ranks have called it; its timeout must exceed the time of tokenising.

    Raises:
        RecordError: a bad file or record, with file and line.
        ValueError: invalid arguments; on other ranks, that the builder failed.
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
    failure: Exception | None = None
    try:
        check_record_file(source.path)
        identity = _identity(source, tokenizer)
        name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=12).hexdigest()
        store_folder = Path(folder) / f"{kind}-{name}"
        if is_builder:
            ensure_folder(store_folder, identity, partial(write_records, source=source, tokenizer=tokenizer))
    except (ValueError, OSError) as error:
        failure = error
    barrier()
    if failure is not None:
        raise failure
    try:
        facts = read_folder(store_folder, identity, checks_content=False)
    except DamagedFolder as error:
        raise ValueError(
            f"{error}: either the rank that tokenises {path} failed, see its error, or the ranks do not see "
            "the same files"
        ) from error
    try:
        errors = tuple(RecordError(path, line, reason) for line, reason in facts.pop("errors"))
        return TokenStore(store_folder, kind, StoreReport(errors=errors, **facts))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{store_folder} holds no token store ({error!r}): remove it") from error


def _identity(source: Source, tokenizer: Tokenizer | None) -> dict:
    """Return all inputs that determine a store's content, as JSON values; the path is not among them."""
    settings = asdict(source)
    del settings["path"]
    vocabulary = None if tokenizer is None else tokenizer_digest(tokenizer)
    return {"format": FORMAT, "file": file_digest(source.path), "tokenizer": vocabulary, **settings}


def _check_vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> None:
    if not 1 <= vocab_size <= ANY_ID:
        raise ValueError(f"vocab_size is {vocab_size}; it must be from 1 to {ANY_ID}")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding only {vocab_size} rows; "
            "they are not of the same model"
        )


def _mapped(path: Path, dtype: type, count: int) -> np.ndarray:
    # A plain array, because slicing np.memmap itself is several times slower.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))
