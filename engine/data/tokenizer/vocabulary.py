"""The token table, id → bytes of an ordinary or name of a special token, and decoding with it."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

Unknown = Literal["raise", "replace"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """A vocabulary by ids. Ids in neither mapping are rows of the embedding without a token."""

    bytes_by_id: Mapping[int, bytes] = field(repr=False)
    """Ordinary tokens: id → UTF-8 bytes, which need not be whole characters."""
    name_by_id: Mapping[int, str]
    """Special tokens: id → name, such as `<|user|>`. They decode to nothing, or to their name on request."""
    spaced_ids: frozenset[int] = field(default=frozenset(), repr=False)
    """Ids whose leading space is dropped at the beginning of a run of ordinary tokens: sentencepiece puts a
    space before every text that it encodes, and drops it when decoding."""
    added_ids: frozenset[int] = field(default=frozenset(), repr=False)
    """Ids of ordinary tokens that were added to a sentencepiece vocabulary: each is a run of its own."""
    id_by_name: Mapping[str, int] = field(init=False, repr=False)
    """Special tokens: name → id."""
    size: int = field(init=False)
    """One more than the largest id."""

    def __post_init__(self) -> None:
        both = self.bytes_by_id.keys() & self.name_by_id.keys()
        assert not both, f"ids {sorted(both)[:5]} are ordinary and special"
        object.__setattr__(self, "id_by_name", {name: token for token, name in self.name_by_id.items()})
        object.__setattr__(self, "size", max([-1, *self.bytes_by_id, *self.name_by_id]) + 1)


def decode(
    table: TokenTable, ids: Sequence[int], *, skip_special: bool = True, unknown: Unknown = "raise"
) -> str:
    """Return the text of `ids`.

    Runs of ordinary tokens are decoded as UTF-8; a special token ends a run. Bytes that are not UTF-8, such
    as an incomplete character at the end, become U+FFFD, one for each maximal invalid part.

    Args:
        table: of the vocabulary.
        ids: any number of token ids.
        skip_special: omit special tokens; otherwise write their names.
        unknown: for an id without a token: `raise`, or `replace` it by U+FFFD.

    Raises:
        ValueError: an id without a token, with `unknown="raise"`.
    """
    parts: list[str] = []
    run: list[bytes] = []
    ordinary, special = table.bytes_by_id, table.name_by_id
    for position, token in enumerate(ids):
        written = ordinary.get(token)
        if written is not None and token not in table.added_ids:
            run.append(written[1:] if not run and token in table.spaced_ids else written)
            continue
        parts.append(b"".join(run).decode("utf-8", "replace"))
        run.clear()
        if written is not None:
            parts.append(written.decode())
        elif token in special:
            parts.append("" if skip_special else special[token])
        else:
            parts.append(_text_of_unknown(table, token, position, unknown))
    parts.append(b"".join(run).decode("utf-8", "replace"))
    return "".join(parts)


class StreamDecoder:
    """Decodes ids one by one; the concatenated pieces equal `decode` of all ids.

    A character whose bytes are spread over several tokens is returned with the last of them, so that no piece
    holds part of a character. Returned text never changes.
    """

    def __init__(self, table: TokenTable, *, skip_special: bool = True, unknown: Unknown = "raise") -> None:
        self._table = table
        self._skip_special = skip_special
        self._unknown = unknown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._opens_run = True
        self._position = 0

    def push(self, token: int) -> str:
        """Return the text that this id completes; may be empty.

        Raises:
            ValueError: an id without a token, with `unknown="raise"`.
        """
        table, position = self._table, self._position
        self._position += 1
        written = table.bytes_by_id.get(token)
        if written is not None and token not in table.added_ids:
            drops_space = self._opens_run and token in table.spaced_ids
            self._opens_run = False
            return self._utf8.decode(written[1:] if drops_space else written)
        if written is not None:
            text = written.decode()
        elif token in table.name_by_id:
            text = "" if self._skip_special else table.name_by_id[token]
        else:
            text = _text_of_unknown(table, token, position, self._unknown)
        return self.finish() + text

    def finish(self) -> str:
        """Return the rest: U+FFFD for an incomplete character, else an empty text."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._opens_run = True
        return text


def ids_without_token(table: TokenTable, num_rows: int) -> torch.Tensor:
    """Return a bool tensor [num_rows], true where no token has that id.

    Args:
        table: of the vocabulary.
        num_rows: rows of the embedding, at least `table.size`.

    Raises:
        ValueError: fewer rows than ids.
    """
    if num_rows < table.size:
        raise ValueError(
            f"the embedding has {num_rows} rows, but the tokenizer's ids go up to {table.size - 1}; "
            "they are not of the same model"
        )
    is_without_V = torch.ones(num_rows, dtype=torch.bool)
    is_without_V[_as_tensor([*table.bytes_by_id, *table.name_by_id])] = False
    return is_without_V


def with_special_ids(
    is_masked_V: torch.Tensor, table: TokenTable, *, except_names: Iterable[str]
) -> torch.Tensor:
    """Return the mask with the ids of all special tokens set too, except those of `except_names`."""
    keep = set(except_names)
    masked_V = is_masked_V.clone()
    masked_V[_as_tensor([token for token, name in table.name_by_id.items() if name not in keep])] = True
    return masked_V


def _as_tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def _text_of_unknown(table: TokenTable, token: int, position: int, unknown: Unknown) -> str:
    if unknown == "replace":
        return _REPLACEMENT
    raise ValueError(
        f"ids[{position}] is {token!r}, which no token has (ids go from 0 to {table.size - 1}); "
        'pass unknown="replace" to see it as U+FFFD'
    )
