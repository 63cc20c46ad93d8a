"""Whether a checkpoint belongs to the run that is to resume from it."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64
_SUFFIXES = (".safetensors", ".bin", ".json")

_FREE_SECTIONS = ("parallel", "observe", "evaluate")
_FREE_KEYS = {
    *("run.name", "run.output", "run.resume"),
    *("train.steps", "train.micro_batch_tokens", "train.recompute_layers", "train.overlap_communication"),
    *(
        "train.save_every",
        "train.save_every_s",
        "train.keep_last",
        "train.keep_every",
        "train.async_save",
        "train.export_every",
    ),
    *("train.eval_every", "train.sample_every", "train.max_nonfinite_steps", "optimizer.in_backward"),
    *("generation.max_batch", "generation.max_step_tokens", "generation.page_size", "generation.cache_bytes"),
    *("data.eval_path", "data.eval_records"),
}
"""Settings that a run may change where it resumes: none of them decides what a step computes, but for
`train.steps`, at which the learning rate ends, and `optimizer.in_backward`, which clips by other norms."""


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
) -> None:
    """Check that a run resumes as it began.

    Args:
        folder: the checkpoint, for messages.
        config_then, config_now: settings as JSON values; paths do not count, what they lead to does.
        identity_then, identity_now: fingerprints by key; None on ranks that have not made them.

    Raises:
        ValueError: names what differs.
    """
    then, now = dict(_flat(config_then)), dict(_flat(config_now))
    changed = [
        f"{key} was {then[key]} and is {now[key]}"
        for key in then
        if key in now and then[key] != now[key] and not _is_free(key)
    ]
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


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or key.split(".")[0] in _FREE_SECTIONS or key.endswith("path")


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, keys in config.items():
        if isinstance(keys, Mapping):
            yield from ((f"{section}.{name}", value) for name, value in keys.items())
