"""The tokenizer of ChatGLM2 and ChatGLM3: a sentencepiece model, and special tokens numbered after it."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import sentencepiece

from glm_rlhf.engine.data.tokenizer.chat_format import CHATGLM2, CHATGLM3
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.tokenizer.reserved_tokens import ReservedTokens
from glm_rlhf.engine.data.tokenizer.vocabulary import TokenTable

SPACE_SIGN = "\u2581"
"""The character that represents a space in sentencepiece's pieces."""

_SPECIALS = {
    "chatglm2": ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    "chatglm3": (
        *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
}
_FORMATS = {"chatglm2": CHATGLM2, "chatglm3": CHATGLM3}


class UnknownChatFormat(ValueError):
    """A folder whose files do not say which of two chat formats it has."""


def load_chatglm(
    folder: Path,
    *,
    chat_format: str,
    tokenizer_config: Mapping,
    model_config: Mapping,
    reserved: ReservedTokens,
) -> Tokenizer:
    """Return the tokenizer of a ChatGLM2 or ChatGLM3 folder, without `extra_stop_ids`.

    No file lists the special tokens: the family's code numbers them from the size of the sentencepiece model,
    in the order of `_SPECIALS`. The real ChatGLM3 has 64789 pieces, hence `[MASK]` 64789, `[gMASK]`
    64790, `[sMASK]` 64791, `sop` 64792, `eop` 64793, `<|system|>` 64794, `<|user|>` 64795, `<|assistant|>`
    64796, `<|observation|>` 64797. Padding is `<unk>`, id 0. `added_tokens_decoder` in the tokenizer's config
    may repeat them, and may add more, which are ordinary tokens unless they are reserved.

    Args:
        folder: holds `tokenizer.model`.
        chat_format: `chatglm2`, `chatglm3`, or `auto`: detected, see `chatglm_version`.
        tokenizer_config: parsed `tokenizer_config.json`; empty without one.
        model_config: parsed `config.json`; empty without one.
        reserved: the folder's reserved tokens.

    Raises:
        ValueError: not a sentencepiece model, an unknown version, or special tokens that contradict the
            family's table.
    """
    path = folder / "tokenizer.model"
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}; download the file again") from error
    version = (
        chatglm_version(folder, tokenizer_config, model_config) if chat_format == "auto" else chat_format
    )
    if version not in _FORMATS:
        raise ValueError(
            f"{path} is a sentencepiece model; its chat format is chatglm2 or chatglm3, not {version!r}"
        )
    specials = {pieces.vocab_size() + i: name for i, name in enumerate(_SPECIALS[version])}
    declared = _declared_tokens(path, pieces.vocab_size(), specials, tokenizer_config)
    specials |= {token: name for token, name in declared.items() if reserved.holds(name, token)}
    added = {name: token for token, name in declared.items() if token not in specials}
    table = table_of_pieces(pieces, specials, added)
    encode = pieces.encode if not added else partial(_encode_around, pieces, _any_of(added), added)
    return Tokenizer(table=table, chat=_FORMATS[version], encode_text=encode)


def chatglm_version(folder: Path, tokenizer_config: Mapping, model_config: Mapping) -> str:
    """Return `chatglm2` or `chatglm3`, whose tokenizer files have the same names and class.

    Checked in this order: the chat template (only ChatGLM3's has role markers); the family's code in the
    folder, `tokenization_chatglm.py`, which is read as text and never run; the model name in the configs.

    Raises:
        ValueError: the version cannot be detected.
    """
    template = tokenizer_config.get("chat_template")
    if isinstance(template, str) and "<|" in template:
        return "chatglm3"
    code = folder / "tokenization_chatglm.py"
    if code.is_file():
        return "chatglm3" if "<|user|>" in code.read_text(encoding="utf-8", errors="replace") else "chatglm2"
    for config in (tokenizer_config, model_config):
        for key in ("name_or_path", "_name_or_path"):
            match = re.search(r"chatglm([23])", str(config.get(key, "")).lower())
            if match is not None:
                return f"chatglm{match.group(1)}"
    raise UnknownChatFormat(
        f"{folder} may be of ChatGLM2 or ChatGLM3 (no chat template, no tokenization_chatglm.py, no name in "
        "its configs); pass chat_format=chatglm2 or chat_format=chatglm3"
    )


def _any_of(added: Mapping[str, int]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))


def _encode_around(
    pieces: sentencepiece.SentencePieceProcessor,
    pattern: re.Pattern[str],
    added: Mapping[str, int],
    text: str,
) -> list[int]:
    """Return the ids of a text that may hold added tokens; the texts around them are encoded one by one."""
    ids: list[int] = []
    start = 0
    for match in pattern.finditer(text):
        ids += pieces.encode(text[start : match.start()])
        ids.append(added[match.group(0)])
        start = match.end()
    return ids + pieces.encode(text[start:])


def table_of_pieces(
    pieces: sentencepiece.SentencePieceProcessor,
    specials: Mapping[int, str],
    added: Mapping[str, int] | None = None,
) -> TokenTable:
    """Return the token table of the model's pieces, and of the special and added tokens numbered after them.

    Control pieces (`<s>`, `</s>`) and `<unk>` are special; unused pieces are not tokens.
    """
    ids = list(range(pieces.vocab_size()))
    names = pieces.id_to_piece(ids)
    control, unknown, unused = pieces.is_control(ids), pieces.is_unknown(ids), pieces.is_unused(ids)
    is_byte = pieces.is_byte(ids)
    bytes_by_id: dict[int, bytes] = {}
    name_by_id: dict[int, str] = {}
    spaced: list[int] = []
    for i, name in enumerate(names):
        if control[i] or unknown[i]:
            name_by_id[i] = name
        elif is_byte[i]:
            bytes_by_id[i] = bytes([int(name[3:5], 16)])  # written <0xE4>
        elif not unused[i]:
            bytes_by_id[i] = name.replace(SPACE_SIGN, " ").encode()
            if name.startswith(SPACE_SIGN):
                spaced.append(i)
    # Whether the model puts a space before a text is a setting inside it, which its decoder shows.
    added = added or {}
    bytes_by_id |= {token: name.encode() for name, token in added.items()}
    puts_space = bool(spaced) and not pieces.decode([spaced[0]]).startswith(bytes_by_id[spaced[0]].decode())
    return TokenTable(
        bytes_by_id=bytes_by_id,
        name_by_id=name_by_id | dict(specials),
        spaced_ids=frozenset(spaced if puts_space else ()),
        added_ids=frozenset(added.values()),
    )


def _declared_tokens(
    path: Path, num_pieces: int, expected: Mapping[int, str], tokenizer_config: Mapping
) -> dict[int, str]:
    declared = tokenizer_config.get("added_tokens_decoder", {})
    config_path = path.parent / "tokenizer_config.json"
    if not isinstance(declared, Mapping):
        raise ValueError(f"{config_path}: added_tokens_decoder must be an object of ids")
    id_of = {name: token for token, name in expected.items()}
    further: dict[int, str] = {}
    for key, entry in declared.items():
        name = entry.get("content") if isinstance(entry, Mapping) else None
        if not key.isdecimal() or not isinstance(name, str) or not name:
            raise ValueError(f"{config_path}: added_tokens_decoder[{key!r}] names no token")
        token = int(key)
        if token < num_pieces:
            continue
        if id_of.get(name, token) != token or expected.get(token, name) != name:
            raise ValueError(
                f"{config_path} gives {name!r} id {token}, but after the {num_pieces} pieces of "
                f"tokenizer.model it has id {id_of.get(name, 'none')}; the two files are of different models"
            )
        further[token] = name
    return further
