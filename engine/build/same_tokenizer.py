"""Whether two models of a run read the same ids: their tokenizers give every id the same text."""

from pathlib import Path

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.tokenizer.chatglm import UnknownChatFormat
from glm_rlhf.engine.data.tokenizer.load import has_tokenizer, load_tokenizer
from glm_rlhf.parallel.storage.text_files import read_regular

_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_MAX_BYTES = 2**28


def check_same_tokenizer(
    key: str, folder: str | Path, tokenizer: Tokenizer | None, tokenizer_folder: str | Path
) -> str | None:
    """Check that the tokenizer of another model's folder has the ids of the command's own.

    Args:
        key: of the config, that named the folder.
        folder: the other model's.
        tokenizer: the command's own; None where there is none.
        tokenizer_folder: where that was found.

    Returns:
        A sentence for the log if only one of the two has a tokenizer and nothing can be compared; else None.

    Raises:
        ValueError: an id has another text or none in one of the two; or the other tokenizer is damaged.
    """
    folder, own = Path(folder), Path(tokenizer_folder)
    if own.is_file():
        own = own.parent
    if folder.resolve() == own.resolve():
        return None
    if (tokenizer is None) == has_tokenizer(folder):
        without = f"{key}, {folder}," if tokenizer is not None else f"the policy, {own},"
        return f"{without} has no tokenizer: whether its ids are those of the other model is not checked"
    if tokenizer is None or all(_content(folder / name) == _content(own / name) for name in _FILES):
        return None
    try:
        other = load_tokenizer(folder)
    except UnknownChatFormat:
        other = load_tokenizer(folder, chat_format=tokenizer.chat.name)
    texts, other_texts = _texts(tokenizer), _texts(other)
    if texts == other_texts:
        return None
    differing = sorted(
        token for token in texts.keys() | other_texts.keys() if texts.get(token) != other_texts.get(token)
    )
    first = differing[0]
    raise ValueError(
        f"{key} is {folder}, whose tokenizer gives other texts to {len(differing)} ids than that in {own}: "
        f"id {first} is {_shown(other_texts.get(first))} there and {_shown(texts.get(first))} here; both "
        "models must be of one tokenizer"
    )


def _texts(tokenizer: Tokenizer) -> dict[int, bytes]:
    names = {token: name.encode() for token, name in tokenizer.table.name_by_id.items()}
    return dict(tokenizer.table.bytes_by_id) | names


def _shown(text: bytes | None) -> str:
    return "no token" if text is None else f"{text.decode('utf-8', 'replace')!r:.40}"


def _content(path: Path) -> bytes | None:
    return read_regular(path, max_bytes=_MAX_BYTES) if path.exists() else None
