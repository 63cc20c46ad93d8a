"""The Hugging Face folders of a run: each carries a mark of its run, and a run replaces its own only."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.durable_io import recover_folder, remove, replace_folder, sync, write_synced
from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.text_files import read_json

EXPORTS = "hf"
"""Folder, in a run folder, of the Hugging Face folders."""
BEST = "best"
"""Name of the one with the highest reward."""
MARK = ".glm_rlhf_export"
"""File in an export: the run, the step and further values of whoever made it, as JSON."""

_MAX_MARK_BYTES = 65536
_STEP = re.compile(r"step_(\d{1,18})")
_LEFTOVER = re.compile(
    r"\.(?P<name>step_\d+|best)\.(?P<kind>new|replaced)|\.\..*\.new\.(partial|lock)|best\.new"
)


class RunExports:
    """Owns the folder of a run's exports; every rank makes one and calls its methods together.

    An export is written next to its final name and then takes it in one step, also where an export of this
    run has it: a run that resumes makes some of its exports again. A folder without this run's mark is never
    replaced.
    """

    def __init__(
        self, run_folder: str | Path, *, run: str, export: Callable[[Path], None], topology: Topology
    ) -> None:
        """Take what decides about the folder.

        Args:
            run_folder: of the run.
            run: fingerprint of the run, on the main rank.
            export: writes the Hugging Face folder that it is given.
            topology: layout and groups.
        """
        self.folder = Path(run_folder) / EXPORTS
        self._run, self._export, self._topology = run, export, topology

    def open(self, first_step: int) -> None:
        """Repair what a kill left, and check what this run will replace.

        Args:
            first_step: steps completed before; exports of later ones are made again.

        Raises:
            ValueError: an export of a later step is not this run's; on every rank.
        """
        with raise_on_all_ranks(f"looking into {self.folder}"):
            if self._topology.is_main_rank and self.folder.is_dir():
                for path in list(self.folder.iterdir()):
                    self._repair(path)
                for path in sorted(self.folder.iterdir()):
                    step = _STEP.fullmatch(path.name)
                    if step and int(step[1]) > first_step and not self._is_replaceable(path):
                        raise ValueError(_foreign(path))

    def write(self, name: str, **values: Any) -> None:
        """Write an export, in the place of this run's earlier one of that name if there is one.

        Args:
            name: of the folder.
            values: for its mark, JSON values.

        Raises:
            ValueError: it cannot be written, or the name belongs to a folder that is not this run's; on every
                rank.
        """
        target = self.folder / name
        new = target.with_name(f".{name}.new")
        with raise_on_all_ranks(f"making room for {target}"):
            if self._topology.is_main_rank:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.check_free(name)
                remove(new)
        self._export(new)
        with raise_on_all_ranks(f"writing {target}"):
            if self._topology.is_main_rank:
                mark = {"run": self._run, **values}
                write_synced(new / MARK, json.dumps(mark).encode() + b"\n")
                sync(new)
                replace_folder(new, target)

    def values_of(self, name: str) -> dict[str, Any] | None:
        """Return the mark of this run's export of a name, the same on all ranks; None where it has none."""
        found: list[dict[str, Any] | None] = [None]
        with raise_on_all_ranks(f"looking for {self.folder / name}"):
            if self._topology.is_main_rank:
                found[0] = self._own_mark(self.folder / name)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def check_free(self, name: str) -> None:
        """Check that this run may write an export of a name; the main rank calls this.

        Raises:
            ValueError: something there is not this run's.
        """
        if not self._is_replaceable(self.folder / name):
            raise ValueError(_foreign(self.folder / name))

    def has(self, name: str) -> bool:
        """Return whether something has this name, the same on all ranks."""
        with raise_on_all_ranks(f"looking for {self.folder / name}"):
            is_there = [os.path.lexists(self.folder / name)]
        dist.broadcast_object_list(is_there, src=0)
        return is_there[0]

    def _repair(self, path: Path) -> None:
        leftover = _LEFTOVER.fullmatch(path.name)
        if path.name == f"{BEST}.old":  # of a version that replaced it in two steps
            if not os.path.lexists(self.folder / BEST):
                path.rename(self.folder / BEST)
            remove(path)
        elif leftover and leftover["kind"] == "replaced":
            recover_folder(self.folder / leftover["name"])
        elif leftover:
            remove(path)

    def _is_replaceable(self, path: Path) -> bool:
        """Return whether a name is free, or that of an empty folder or of this run's export."""
        if not os.path.lexists(path):
            return True
        is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        return is_empty or self._own_mark(path) is not None

    def _own_mark(self, path: Path) -> dict[str, Any] | None:
        mark = read_mark(path)
        return mark if mark is not None and mark.get("run") == self._run else None


def read_mark(path: Path) -> dict[str, Any] | None:
    """Return the mark of an export; None for a folder without a valid one."""
    file = path / MARK
    with contextlib.suppress(OSError, ModelFolderError, UnicodeDecodeError):
        if not path.is_symlink():
            return read_json(file, max_bytes=_MAX_MARK_BYTES)
    return None


def unmarked_exports(run_folder: Path) -> list[str]:
    """Return the names of exports of steps that no version of this program has marked."""
    paths = (run_folder / EXPORTS).glob("step_*")
    return sorted(path.name for path in paths if read_mark(path) is None)


def _foreign(path: Path) -> str:
    return (
        f"{path} exists and is no export of this run, which would write there: move it away, or give this "
        "run another run.name or run.output"
    )
