"""What all ranks of a launch have to be started with: one config, one model, one set of data and programs."""

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import glm_rlhf.kernels
import glm_rlhf.parallel
from glm_rlhf.engine.data.store.build_cache import file_digest
from glm_rlhf.engine.health.survey import ABSENT, PACKAGES
from glm_rlhf.engine.runs.deciding_keys import flat_settings, is_path
from glm_rlhf.engine.runs.fingerprint import model_identity
from glm_rlhf.kernels.dispatch.launch import ENVIRONMENT_VARIABLE
from glm_rlhf.parallel.runtime.agreement import Content, check_ranks_agree

_OUTPUTS = ("run.output", "run.resume", "data.out", "label.prompts_out", "convert.to")
"""Places that a run writes to or resumes from, which hosts may mount differently: names need not be equal."""


def check_same_start(config: Any) -> None:
    """Raise where ranks of a launch differ in what decides its result; every rank of the world calls this.

    Compared are all settings, the content of the models and files that they lead to, the versions of the
    packages, the code of this one, and the choice of kernels. Files are compared by all of their bytes, model
    folders as `model_identity` does.

    Args:
        config: root config of the command.

    Raises:
        ValueError: names the key and the ranks; on all of them.
    """
    settings = dict(flat_settings(json.loads(json.dumps(dataclasses.asdict(config), default=str))))
    values = {"the command's config": type(config).__name__}
    values |= {
        key: json.dumps(value, ensure_ascii=False)
        for key, value in settings.items()
        if key not in _OUTPUTS and not (is_path(key) and value is not None)
    }
    values |= _versions()
    values[ENVIRONMENT_VARIABLE] = os.environ.get(ENVIRONMENT_VARIABLE, "not set")
    check_ranks_agree(values, _contents(settings) | _code())


def _contents(settings: Mapping[str, Any]) -> dict[str, Content]:
    return {
        key: Content(place=os.path.realpath(value), digest=partial(_digest, Path(value)))
        for key, value in settings.items()
        if is_path(key) and value is not None and key not in _OUTPUTS
    }


def _digest(path: Path) -> str:
    """Return a digest of a model folder or a file; the words of the error where it cannot be read."""
    try:
        if path.is_dir():
            return model_identity(path)
        return file_digest(path) if path.is_file() else "no file"
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


def _versions() -> dict[str, str]:
    versions = {"the version of python": platform.python_version()}
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ABSENT
        versions[f"the version of {name}"] = version
    return versions


def _code() -> dict[str, Content]:
    others = (glm_rlhf.kernels, glm_rlhf.parallel)
    folders = [Path(__file__).parents[1], *(Path(floor.__path__[0]) for floor in others)]
    place = ", ".join(str(folder) for folder in folders)
    return {"the code of glm-rlhf": Content(place=place, digest=partial(_code_digest, folders))}


def _code_digest(folders: list[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
