"""Vocabulary files in tiktoken's format (a base64 token and its rank per line) as a byte-level BPE."""

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n?")

_MAX_TOKEN_BYTES = 1024
"""Longest token: GLM-4's has 128 bytes; each split of a token is considered, in quadratic time."""

GLM4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regex by which GLM-4 splits text into words before merging; its own code passes it to tiktoken."""


def is_ranks_file(path: Path) -> bool:
    """Return whether the file's first line is a base64 token and its rank."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096)) is not None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return token bytes → rank, which is the token's id.

    Raises:
        ValueError: a line of another form, a duplicate rank or token, or a missing single byte.
    """
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            encoded, _, rank = line.strip().partition(b" ")
            try:
                token, value = base64.b64decode(encoded, validate=True), int(rank)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"{path}:{number}: expected a base64 token and its rank: {error}") from error
            if not token or token in ranks:
                raise ValueError(f"{path}:{number}: token {token!r:.80} is empty or a duplicate")
            if len(token) > _MAX_TOKEN_BYTES:
                raise ValueError(
                    f"{path}:{number}: a token has {len(token)} bytes; it may have {_MAX_TOKEN_BYTES}"
                )
            ranks[token] = value
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} single bytes, the first {missing[0]:#04x}; download it again"
        )
    if len(set(ranks.values())) != len(ranks):
        raise ValueError(f"{path} gives one rank to two tokens; download it again")
    return ranks


def byte_level_bpe(
    ranks: Mapping[bytes, int], split: str = GLM4_SPLIT, *, words: Mapping[str, int] | None = None
) -> Tokenizer:
    """Return a `tokenizers` BPE that merges as tiktoken does with these ranks.

    Tiktoken repeatedly joins the neighbours whose joined bytes have the lowest rank. As merge rules: each
    split of a token into two tokens is a rule, rules are ordered by the joined rank, and a word that is a
    token is not split. The order differs only where two overlapping splits of one token compete inside a word
    (both join to the same bytes): tiktoken takes the left one, this the one with the lower ranks. The decoded
    text is the same.

    Args:
        ranks: token bytes → id.
        split: regular expression that splits text into words before merging.
        words: added tokens → id, found in a text before it is split.
    """
    words = dict(words or {})
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(map(letters.__getitem__, token))

    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted(
            (ranks[left], ranks[right], left, right)
            for left, right in cuts
            if left in ranks and right in ranks
        )
        merges += [(spelled(left), spelled(right)) for _, _, left, right in pairs]
    # The library numbers added tokens anew, unless the model has them.
    vocabulary = {spelled(token): rank for token, rank in ranks.items()} | words
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if words:
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def byte_letters() -> list[str]:
    """Return the character of each byte in a byte-level vocabulary, as defined by GPT-2.

    Printable Latin-1 bytes keep their character; the others get U+0100, U+0101, … in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters: list[str] = []
    num_shifted = 0
    for byte in range(256):
        letters.append(chr(byte if byte in printable else 0x100 + num_shifted))
        num_shifted += byte not in printable
    return letters
