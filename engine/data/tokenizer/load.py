"""Loads the tokenizer of a Hugging Face folder, whose files determine its kind."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.tokenizer.chatglm import load_chatglm
from glm_rlhf.engine.data.tokenizer.glm4 import load_ranks, load_tokenizer_json
from glm_rlhf.engine.data.tokenizer.reserved_tokens import reserved_tokens
from glm_rlhf.engine.data.tokenizer.stop_ids import declared_stop_ids
from glm_rlhf.engine.data.tokenizer.tiktoken_vocab import is_ranks_file
from glm_rlhf.parallel.storage.model_folder import plain_file
from glm_rlhf.parallel.storage.text_files import read_json, read_text

_MAX_TEMPLATE_BYTES = 2**20
"""Largest chat template: those of GLM have a few KiB."""

CHAT_FORMATS = ("auto", "chatglm2", "chatglm3", "glm4")

__all__ = ["CHAT_FORMATS", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path, *, chat_format: str = "auto") -> Tokenizer:
    """Return the tokenizer of a model's folder; no code in the folder is run, nothing is downloaded.

    | the folder holds | model family |
    |---|---|
    | `tokenizer.model`, a sentencepiece model | ChatGLM2 or ChatGLM3 |
    | `tokenizer.json` | GLM-4, GLM-4-0414 |
    | `tokenizer.model`, base64 lines (tiktoken's format) | GLM-4 with remote code |

    The first matching row counts. `eos_token_id` of `generation_config.json` and `config.json` (a number or a
    list) is added to the chat format's stop ids.

    Args:
        path: the folder, or one of the two files in it.
        chat_format: `auto`, or `chatglm2` | `chatglm3` | `glm4` where detection fails or is wrong.

    Raises:
        ValueError: no tokenizer, a damaged or unknown one, one that encodes typed markers as special tokens,
            or a chat format that does not match it.
    """
    if chat_format not in CHAT_FORMATS:
        raise ValueError(f"chat_format is {chat_format!r}; it must be one of {', '.join(CHAT_FORMATS)}")
    folder = Path(path)
    if folder.name in ("tokenizer.model", "tokenizer.json") and folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the model's folder, with its tokenizer files")
    tokenizer_config = _read_object(folder, "tokenizer_config.json")
    model_config = _read_object(folder, "config.json")
    generation_config = _read_object(folder, "generation_config.json")
    reserved = reserved_tokens(tokenizer_config, model_config, generation_config)
    model, description = folder / "tokenizer.model", folder / "tokenizer.json"
    for path in (model, description):
        if os.path.lexists(path):
            _raise_if_not_content(plain_file(folder, path.name))
    is_ranks = model.is_file() and is_ranks_file(model)
    if model.is_file() and not is_ranks:
        tokenizer = load_chatglm(
            folder,
            chat_format=chat_format,
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            reserved=reserved,
        )
    elif description.is_file() or is_ranks:
        if chat_format not in ("auto", "glm4"):
            raise ValueError(f"{folder} holds GLM-4's vocabulary; its chat format is glm4, not {chat_format}")
        template = _template(folder, tokenizer_config)
        if description.is_file():
            tokenizer = load_tokenizer_json(description, template=template, reserved=reserved)
        else:
            tokenizer = load_ranks(
                model, tokenizer_config=tokenizer_config, template=template, reserved=reserved
            )
    else:
        raise ValueError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; copy the model's tokenizer files "
            "there, or give their folder as tokenizer.path"
        )
    _check_markers_stay_text(folder, tokenizer)
    stops: list[int] = []
    for name, config in (("generation_config.json", generation_config), ("config.json", model_config)):
        stops += declared_stop_ids(config, folder / name, num_ids=tokenizer.vocab_size, whose="the tokenizer")
    return replace(tokenizer, extra_stop_ids=tuple(dict.fromkeys(stops)))


def has_tokenizer(path: str | Path) -> bool:
    """Return whether a folder holds a tokenizer file of any kind, valid or not, or what has its name."""
    return any(os.path.lexists(Path(path) / name) for name in ("tokenizer.model", "tokenizer.json"))


def _check_markers_stay_text(folder: Path, tokenizer: Tokenizer) -> None:
    special = tokenizer.table.name_by_id
    for name in special.values():
        if not special.keys().isdisjoint(tokenizer.encode_text(name) + tokenizer.encode_text(f"a{name}b")):
            raise ValueError(
                f"{folder}: a typed {name!r} would become a special token, and a user could forge a turn; "
                "remove it from the vocabulary's words and keep it as an added token"
            )


def _template(folder: Path, tokenizer_config: Mapping) -> str:
    if os.path.lexists(folder / "chat_template.jinja"):
        return read_text(plain_file(folder, "chat_template.jinja"), max_bytes=_MAX_TEMPLATE_BYTES)
    template = tokenizer_config.get("chat_template", "")
    return template if isinstance(template, str) else ""


def _read_object(folder: Path, name: str) -> Mapping:
    """Return the JSON object in a file of the folder, or an empty one without the file."""
    return read_json(plain_file(folder, name)) if os.path.lexists(folder / name) else {}


def _raise_if_not_content(path: Path) -> None:
    """Raise ValueError if a file is a git-lfs pointer or empty."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"
        )
    if not head:
        raise ValueError(f"{path} is empty; download the file again")
