"""The tokenizer of GLM-4: a byte-level BPE of the library `tokenizers`, with markers as added tokens."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer as ByteLevelBpe

from glm_rlhf.engine.data.tokenizer.chat_format import GLM4, opening_text_of_template, with_opening_text
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.tokenizer.reserved_tokens import ReservedTokens
from glm_rlhf.engine.data.tokenizer.split_patterns import check_patterns
from glm_rlhf.engine.data.tokenizer.tiktoken_vocab import byte_letters, byte_level_bpe, read_ranks
from glm_rlhf.engine.data.tokenizer.vocabulary import TokenTable
from glm_rlhf.parallel.storage.text_files import read_json

_MAX_JSON_BYTES = 2**28
"""Largest `tokenizer.json`: GLM-4's has 20 MB."""
_MARKERS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
_REQUIRED = (
    "[gMASK]",
    "<sop>",
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)


def load_tokenizer_json(path: Path, *, template: str, reserved: ReservedTokens) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`, without `extra_stop_ids`.

    Added tokens that are reserved are removed from the encoder, so that only the chat format inserts them;
    the others are ordinary tokens. Truncation, padding and dropout stored in the file are switched off.

    Args:
        path: the file.
        template: the folder's chat template; empty without one. Only the text after `<|assistant|>` in the
            generation prompt is read from it.
        reserved: the folder's reserved tokens.

    Raises:
        ValueError: not a byte-level BPE, GLM-4's markers are missing, or texts take more than linear time.
    """
    description = read_json(path, max_bytes=_MAX_JSON_BYTES)
    try:
        added = {entry["id"]: entry for entry in description["added_tokens"]}
        special = {
            token: entry["content"]
            for token, entry in added.items()
            if reserved.holds(entry["content"], token)
        }
        model, vocabulary = description["model"], description["model"]["vocab"]
        kind = model.get("type", "BPE")
        cutting = json.dumps([description["pre_tokenizer"], description["decoder"]])
        normalizer = json.dumps(description.get("normalizer"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a tokenizer.json of the library tokenizers: {error!r:.120}"
        ) from error
    if kind != "BPE" or "ByteLevel" not in cutting:
        raise ValueError(
            f"{path} holds a {kind} model that is not byte-level; GLM-4's is a byte-level BPE, "
            "so check tokenizer.path"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or "Replace" in normalizer:
        raise ValueError(
            f"{path} has a prefix or suffix of words, or replaces text, which GLM-4's has not; check "
            "tokenizer.path"
        )
    words = [entry | {"special": False} for token, entry in added.items() if token not in special]
    # The post-processor only adds markers, which are removed; texts are never truncated or padded here.
    stripped = {"post_processor": None, "truncation": None, "padding": None, "added_tokens": words}
    # The library renumbers added tokens, so that the remaining ones would move up, unless the model has them.
    known = {"vocab": vocabulary | {entry["content"]: entry["id"] for entry in words}, "dropout": None}
    with _panics_are_errors(f"{path} cannot be loaded by the library tokenizers"), _quiet_panics():
        encoder = ByteLevelBpe.from_str(json.dumps(description | stripped | {"model": model | known}))
        check_patterns(path, description["pre_tokenizer"], partial(encoder.encode, add_special_tokens=False))
    table = _table(path, vocabulary, special, {entry["id"]: entry["content"].encode() for entry in words})
    return _tokenizer(path, encoder, table, template)


def load_ranks(
    path: Path, *, tokenizer_config: Mapping, template: str, reserved: ReservedTokens
) -> Tokenizer:
    """Return the tokenizer of GLM-4's remote-code folders, whose `tokenizer.model` has tiktoken's format.

    The markers' ids are read from `added_tokens_decoder` in the tokenizer's config; without it they are
    numbered after the last rank, as the family's code does: `<|endoftext|>` 151329 to `<|end_of_video|>`
    151342 after the real file's 151329 ranks. Declared tokens that are not reserved are ordinary tokens.

    Raises:
        ValueError: a bad line, or a marker's id that is a rank.
    """
    ranks = read_ranks(path)
    config_path = path.parent / "tokenizer_config.json"
    declared = tokenizer_config.get("added_tokens_decoder") or {}
    try:
        added = {int(token): str(entry["content"]) for token, entry in declared.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: bad added_tokens_decoder: {error!r:.120}") from error
    if not added:
        added = {max(ranks.values()) + 1 + i: name for i, name in enumerate(_MARKERS)}
    taken = sorted(added.keys() & set(ranks.values()))
    if taken:
        raise ValueError(
            f"{config_path} gives {added[taken[0]]!r} id {taken[0]}, which is a rank in {path.name}; "
            "the two files are of different models"
        )
    special = {token: name for token, name in added.items() if reserved.holds(name, token)}
    words = {token: name for token, name in added.items() if token not in special}
    encoder = byte_level_bpe(ranks, words={name: token for token, name in words.items()})
    table = _table(
        path, encoder.get_vocab(), special, {token: name.encode() for token, name in words.items()}
    )
    return _tokenizer(path, encoder, table, template)


def _table(
    path: Path, vocabulary: Mapping[str, int], special: Mapping[int, str], added: Mapping[int, bytes]
) -> TokenTable:
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    try:
        ordinary = {
            token: bytes(map(byte_of.__getitem__, word))
            for word, token in vocabulary.items()
            if token not in special and token not in added
        }
    except KeyError as error:
        raise ValueError(f"{path} is not a byte-level vocabulary: {error} encodes no byte") from error
    return TokenTable(bytes_by_id=ordinary | dict(added), name_by_id=dict(special))


def _tokenizer(path: Path, encoder: ByteLevelBpe, table: TokenTable, template: str) -> Tokenizer:
    missing = [name for name in _REQUIRED if name not in table.id_by_name]
    if missing:
        raise ValueError(
            f"{path} lacks the markers {', '.join(missing)}, so it is not of the GLM-4 family; "
            "check model.path and tokenizer.path"
        )
    chat = with_opening_text(GLM4, opening_text_of_template(template))
    return Tokenizer(table=table, chat=chat, encode_text=partial(_encode, encoder))


def _encode(encoder: ByteLevelBpe, text: str) -> list[int]:
    with _panics_are_errors("the text cannot be encoded by the library tokenizers"):
        return encoder.encode(text, add_special_tokens=False).ids


@contextmanager
def _panics_are_errors(what: str) -> Iterator[None]:
    """Raise ValueError for what the library raises: plain Exception, and panics, which are no Exception."""
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if is_panic or type(error) is Exception:
            raise ValueError(f"{what}: {error!s:.200}") from None
        raise


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """Drop what the library writes to stderr, a page for a panic, if the block raises."""
    with tempfile.TemporaryFile() as sink:
        stderr = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
            sink.seek(0)
            os.write(stderr, sink.read())
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
