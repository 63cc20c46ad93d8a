"""Whether a checkpoint belongs to the run that is to resume from it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_rlhf.engine.runs.deciding_keys import effect_of, flat_settings

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64
_SUFFIXES = (".safetensors", ".bin", ".json")


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
    changed += [
        f"{key} leads to other content than it did"
        for key, value in identity_then.items()
        if identity_now is not None and identity_now.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} is of another run: {'; '.join(changed)}; set them back, or start anew with run.resume "
            "never and another run.name"
        )
    return [clauses[key] for key, effect in different.items() if effect == "last bits"]
