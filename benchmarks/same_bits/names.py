"""Names that differ between two commits: a line in one of these tables has both compared under the new one.

All of the benchmark speaks the new names. A tree is asked which it has (its `--help`, the folders and metrics
that its runs leave), so that its age does not matter. In the tables of metrics and tensors a `*` stands for
any text, which the new name has at its own `*`, and the first line that fits counts.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

RENAMED_KEYS: dict[str, str] = {
    "train.park": "train.offload",
    "ppo.scores_early": "ppo.overlap_scoring",
}
"""Old key: new key."""

RENAMED_METRICS: dict[str, str] = {
    "critic/rewards/num_left_out": "reward/num_excluded",
    "critic/rewards/*": "reward/minus_baseline/*",
}
"""Old metric: new metric."""

RENAMED_FOLDERS: dict[str, str] = {
    "resume": "checkpoints",
    "checkpoints": "hf",
}
"""Old folder in a run folder: new one. A run folder with one that is no new name has the old ones."""

RENAMED_TENSORS: dict[str, str] = {}
"""Old tensor: new tensor, each `file/name in it`."""

CHECKPOINTS, EXPORTS = "checkpoints", "hf"
"""Folders in a run folder: what a run resumes from, and Hugging Face folders."""

NOT_COMPARED = ("timing_s/", "perf/")
"""Metrics that begin so are read off a clock or count memory."""


def key_of(key: str, known: Collection[str]) -> str:
    """Return what a tree that knows these keys calls a key.

    Raises:
        ValueError: it knows the key under none of its names.
    """
    names = [key]
    for name in names:
        names += [old for old, new in RENAMED_KEYS.items() if new == name]
    for name in names:
        if name in known:
            return name
    raise ValueError(f"the tree has no key {' or '.join(names)}: add its other name to RENAMED_KEYS")


def renamed(names: Iterable[str], table: Mapping[str, str]) -> dict[str, str]:
    """Return old name → name to compare under.

    Raises:
        ValueError: two names become one.
    """
    new_names: dict[str, str] = {}
    for name in names:
        new = _renamed(name, table)
        if new in new_names.values():
            raise ValueError(f"{name} and another name are both {new}")
        new_names[name] = new
    return new_names


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        match = re.fullmatch(re.escape(old).replace(r"\*", "(.*)"), name)
        if match:
            for text in match.groups():
                new = new.replace("*", text, 1)
            return new
    return name


def folder_in(run: Path, name: str) -> Path:
    """Return the folder that a run has for `CHECKPOINTS` or `EXPORTS`."""
    new_names = set(RENAMED_FOLDERS.values())
    is_old = any((run / old).is_dir() for old in RENAMED_FOLDERS if old not in new_names)
    if is_old:
        name = {new: old for old, new in RENAMED_FOLDERS.items()}.get(name, name)
    return run / name
