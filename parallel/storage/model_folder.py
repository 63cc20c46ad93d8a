"""Files of a model folder, checked before they are opened."""

import json
import re
from pathlib import Path

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class ModelFolderError(ValueError):
    """A model folder cannot be used; the message names the file, what it holds and what is required."""


def open_folder(folder: str | Path) -> Path:
    """Return the path of `folder` after checking that it is a directory.

    Raises:
        ModelFolderError: it does not exist, or is a file.
    """
    path = Path(folder)
    if not path.exists():
        hint = ""
        if _HUB_NAME.fullmatch(str(folder)):
            hint = (
                f", nothing is downloaded: if this is a name on the Hub, `hf download {folder} --local-dir "
                f"{path.name}` makes one"
            )
        raise ModelFolderError(f"{path} does not exist; give the path of a Hugging Face model folder{hint}")
    if not path.is_dir():
        raise ModelFolderError(f"{path} is a file; give the path of a Hugging Face model folder")
    return path


def plain_file(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`, which must be a regular file directly in that folder.

    Names with a directory, and links out of the folder, are refused: an index is untrusted data and must not
    choose which files of this machine are read. Only links of the hub cache are followed
    (`models--X/snapshots/REVISION/file` → `models--X/blobs/HASH`).

    Raises:
        ModelFolderError: the name leaves the folder, is a link, is missing or is not a regular file.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ModelFolderError(f"{folder} names the file {name!r}; only files of the folder itself are read")
    path = folder / name
    if path.is_symlink() and not _is_hub_cache_link(path):
        raise ModelFolderError(f"{path} is a link; copy the file it points to into the folder")
    if not path.exists():
        raise ModelFolderError(f"{path} is missing; fetch the folder again, or fix the reference to it")
    if not path.is_file():
        raise ModelFolderError(f"{path} is not a regular file")
    return path


def _is_hub_cache_link(path: Path) -> bool:
    folder = path.parent.absolute()
    return folder.parent.name == "snapshots" and path.resolve().parent == (
        folder.parent.parent.resolve() / "blobs"
    )


def read_json(path: Path) -> dict:
    """Return the JSON object in `path`.

    Raises:
        ModelFolderError: not UTF-8, not JSON, a duplicate key, or not an object; the message gives the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return parse_json_object(text, what=str(path))


def parse_json_object(text: str, *, what: str) -> dict:
    """Return `text` as a dict; `what` names it in messages.

    Raises:
        ModelFolderError: not JSON, nested too deeply, a duplicate key, or not an object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ModelFolderError(f"{what} is not JSON: line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{what} is not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{what} holds a {type(value).__name__} at the top; a JSON object is required")
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return result
