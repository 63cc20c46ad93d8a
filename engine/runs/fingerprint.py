"""Whether a checkpoint belongs to the run that is to resume from it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_rlhf.engine.runs.deciding_keys import effect_of, flat_settings

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64
_SUFFIXES = (".safetensors", ".bin", ".json")
_CONTENT = " content"
"""What the key of a checksum ends with, beside that of the lengths."""


def model_identity(folder: str | Path) -> str:
    """Return a fingerprint of a model folder: names and sizes of its files, and samples of their bytes.

    Of each weight file or JSON file 64 stretches of 4 KiB, evenly spread, are read: all of a small file, the
    header and some of each part of a large one.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}\n".encode())
        with path.open("rb") as file:
            for place in range(_NUM_SAMPLES):
                file.seek(max(num_bytes - _SAMPLE_BYTES, 0) * place // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def lengths_identity(lengths: np.ndarray) -> str:
    """Return a fingerprint of records by their number and lengths, in order."""
    return hashlib.sha256(np.ascontiguousarray(lengths, dtype=np.int64).tobytes()).hexdigest()


def content_identity(values: Iterable[Any]) -> str:
    """Return a fingerprint of JSON values, in order; what JSON cannot hold counts by its `repr`."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, default=repr).encode() + b"\n")
    return digest.hexdigest()


def data_identity(key: str, *, lengths: np.ndarray, content: str) -> dict[str, str]:
    """Return the fingerprints of a run's data, by key.

    Args:
        key: that names the data, such as `data.path`.
        lengths: of the records, int64 [n]; checkpoints of 0.1.0 have nothing else to compare.
        content: checksum of all that the run learns from, in order.
    """
    return {key: lengths_identity(lengths), f"{key}{_CONTENT}": content}


def contents_not_in(identity_then: Mapping[str, Any], identity_now: Mapping[str, Any]) -> list[str]:
    """Return the keys of data whose content an earlier run has not recorded."""
    return [
        name.removesuffix(_CONTENT)
        for name in identity_now
        if name.endswith(_CONTENT) and name not in identity_then
    ]


def run_fingerprint(config: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Return a fingerprint of all that decides a run's weights at each step, but for `train.steps`.

    Args:
        config: settings as JSON values.
        identity: fingerprints of models and data, by key.
    """
    deciding = {key: value for key, value in flat_settings(config) if effect_of(key) == "result"}
    return content_identity([sorted(deciding.items()), sorted(identity.items())])


def check_same_run(
    folder: Path,
    config_then: Mapping[str, Any],
    config_now: Mapping[str, Any],
    identity_then: Mapping[str, Any],
    identity_now: Mapping[str, Any] | None,
) -> list[str]:
    """Check that a run resumes as it began; return which settings differ that end equal bits, as clauses.

    Args:
        folder: the checkpoint, for messages.
        config_then, config_now: settings as JSON values; paths do not count, what they lead to does.
        identity_then, identity_now: fingerprints by key; None on ranks that have not made them.

    Raises:
        ValueError: names what differs.
    """
    then, now = dict(flat_settings(config_then)), dict(flat_settings(config_now))
    different = {key: effect_of(key) for key in then if key in now and then[key] != now[key]}
    clauses = {key: f"{key} was {then[key]} and is {now[key]}" for key in different}
    changed = [clauses[key] for key, effect in different.items() if effect == "result"]
    if identity_now is not None:
        other = [key for key, value in identity_then.items() if identity_now.get(key) != value]
        names = dict.fromkeys(key.removesuffix(_CONTENT) for key in other)
        changed += [f"{name} leads to other content than it did" for name in names]
    if changed:
        raise ValueError(
            f"{folder} is of another run: {'; '.join(changed)}; set them back, or start anew with run.resume "
            "never and another run.name"
        )
    return [clauses[key] for key, effect in different.items() if effect == "last bits"]
