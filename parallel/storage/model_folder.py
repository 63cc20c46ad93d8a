"""Files of a model folder, checked before they are opened."""

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MAX_LINKS = 40
"""Links to links that are followed, as in Linux."""


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
    choose which files of this machine are read. Only links into the model's own cache of the Hub are
    followed: those of `models--X/snapshots/REVISION` into `models--X/blobs`, through whatever links the two
    folders are reached, and those of any other folder whose links all lead into one such `blobs`.

    Raises:
        ModelFolderError: the name leaves the folder, is a link, is missing or is not a regular file.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ModelFolderError(
            f"{folder} names the file {name!r:.200}; only files of the folder itself are read"
        )
    path = folder / name
    if path.is_symlink() and not _leads_into_own_cache(path):
        raise ModelFolderError(
            f"{path} is a link out of the model's own folder and cache; copy the file it points to into the "
            "folder"
        )
    if not path.exists():
        raise ModelFolderError(f"{path} is missing; fetch the folder again, or fix the reference to it")
    if not path.is_file():
        raise ModelFolderError(f"{path} is not a regular file")
    return path


def _leads_into_own_cache(path: Path) -> bool:
    target = path.resolve().parent
    folder = path.parent.resolve()
    if folder.parent.name == "snapshots":
        return target == (folder.parent.parent / "blobs").resolve()
    return {_blobs_of(other) for other in folder.iterdir() if other.is_symlink()} - {None} == {target}


def _blobs_of(link: Path) -> Path | None:
    """Return the folder `models--X/blobs` that a link leads into, resolved; None for another link."""
    for _ in range(_MAX_LINKS):
        if not link.is_symlink():
            break
        link = Path(os.path.normpath(link.parent.resolve() / link.readlink()))
    blobs = link.parent
    if blobs.name != "blobs" or not blobs.parent.name.startswith("models--"):
        return None
    return blobs.resolve() if link.resolve().parent == blobs.resolve() else None
