"""The tokenizer of GLM-4: a byte-level BPE of the library `tokenizers`, with markers as added tokens."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer as ByteLevelBpe

from glm_rlhf.engine.data.tokenizer.chat_format import GLM4, opening_text_of_template, with_opening_text
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.tokenizer.tiktoken_vocab import byte_letters, byte_level_bpe, read_ranks
from glm_rlhf.engine.data.tokenizer.vocabulary import TokenTable

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


def load_tokenizer_json(path: Path, *, template: str) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`, without `extra_stop_ids`.

    Added tokens that the file marks as special, and always GLM-4's markers, are removed from the encoder, so
    that only the chat format inserts them; added tokens marked as not special (GLM-4.5's `<think>`) are
    ordinary tokens. Truncation and padding stored in the file are switched off.

    Args:
        path: the file.
        template: the folder's chat template; empty without one. Only the text after `<|assistant|>` in the
            generation prompt is read from it.

    Raises:
        ValueError: not a byte-level BPE, or GLM-4's markers are missing.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        added = {entry["id"]: entry for entry in description["added_tokens"]}
        special = {token: entry["content"] for token, entry in added.items() if _is_marker(entry)}
        vocabulary, kind = description["model"]["vocab"], description["model"].get("type", "BPE")
        cutting = json.dumps([description["pre_tokenizer"], description["decoder"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json of the library tokenizers: {error!r}") from error
    if kind != "BPE" or "ByteLevel" not in cutting:
        raise ValueError(
            f"{path} holds a {kind} model that is not byte-level; GLM-4's is a byte-level BPE, "
            "so check tokenizer.path"
        )
    words = [entry for entry in added.values() if not _is_marker(entry)]
    # The post-processor only adds markers, which are removed; texts are never truncated or padded here.
    stripped = {"post_processor": None, "truncation": None, "padding": None, "added_tokens": words}
    # The library renumbers added tokens, so that the remaining ones would move up, unless the model has them.
    known = {"vocab": vocabulary | {entry["content"]: entry["id"] for entry in words}}
    model = description["model"] | known
    try:
        encoder = ByteLevelBpe.from_str(json.dumps(description | stripped | {"model": model}))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} cannot be loaded by the library tokenizers: {error}") from error
    table = _table(path, vocabulary, special, {entry["id"]: entry["content"].encode() for entry in words})
    return _tokenizer(path, encoder, table, template)


def load_ranks(path: Path, *, tokenizer_config: Mapping, template: str) -> Tokenizer:
    """Return the tokenizer of GLM-4's remote-code folders, whose `tokenizer.model` has tiktoken's format.

    The markers' ids are read from `added_tokens_decoder` in the tokenizer's config; without it they are
    numbered after the last rank, as the family's code does: `<|endoftext|>` 151329 to `<|end_of_video|>`
    151342 after the real file's 151329 ranks.

    Raises:
        ValueError: a bad line, or a marker's id that is a rank.
    """
    ranks = read_ranks(path)
    config_path = path.parent / "tokenizer_config.json"
    declared = tokenizer_config.get("added_tokens_decoder") or {}
    try:
        special = {int(token): str(entry["content"]) for token, entry in declared.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: bad added_tokens_decoder: {error!r}") from error
    if not special:
        special = {max(ranks.values()) + 1 + i: name for i, name in enumerate(_MARKERS)}
    taken = sorted(special.keys() & set(ranks.values()))
    if taken:
        raise ValueError(
            f"{config_path} gives {special[taken[0]]!r} id {taken[0]}, which is a rank in {path.name}; "
            "the two files are of different models"
        )
    encoder = byte_level_bpe(ranks)
    return _tokenizer(path, encoder, _table(path, encoder.get_vocab(), special, {}), template)


def _is_marker(entry: Mapping) -> bool:
    return bool(entry.get("special")) or entry["content"] in _MARKERS


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
    return encoder.encode(text, add_special_tokens=False).ids
