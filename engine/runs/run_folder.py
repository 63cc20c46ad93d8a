"""Which command may write to a run folder or an output file, and what it finds there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_rlhf.engine.config.load import save_config
from glm_rlhf.engine.runs.checkpoints import FOLDER, SavedRun, find_checkpoint
from glm_rlhf.engine.runs.exports import EXPORTS, unmarked_exports
from glm_rlhf.parallel.checkpoint.restore import newest_checkpoint
from glm_rlhf.parallel.checkpoint.save import step_folders
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_tensors import Checkpoint
from glm_rlhf.parallel.storage.writer_lock import WAIT_S, one_writer

_OLD_FOLDER = "resume"


@contextlib.contextmanager
def open_run_folder(config: SavedRun, topology: Topology) -> Iterator[Checkpoint | None]:
    """Hold the run folder, and return what the run resumes from: None for a new run.

    A context manager that every rank enters, first. One run at a time has a run folder, see `one_writer`.
    `run.resume` decides: `auto` takes the newest whole checkpoint of the run folder, if it has any; `never`
    wants a folder without any; a path is a checkpoint, or a folder of them.

    Raises:
        ValueError: another process runs in the folder, the folder holds what this run would have to mix with
            its own, there is no checkpoint at the path, or none of them is whole.
    """
    output = Path(config.run.output)
    with contextlib.ExitStack() as stack:
        with raise_on_all_ranks(f"looking into {output}"):
            if topology.is_main_rank:
                output.mkdir(parents=True, exist_ok=True)
                # Ranks wait for this one in a collective, which has a timeout of its own.
                wait_s = min(WAIT_S, config.parallel.timeout_s / 2)
                stack.enter_context(one_writer(output, is_inside=True, wait_s=wait_s))
                _refuse_old_names(output)
        yield _find(config, output, topology)


def _find(config: SavedRun, output: Path, topology: Topology) -> Checkpoint | None:
    own, wanted = output / FOLDER, config.run.resume
    if wanted == "auto":
        found = newest_checkpoint(own, topology=topology)
        if found is not None:
            return _logged(found, topology)
    elif wanted != "never":
        path = Path(wanted)
        found = find_checkpoint(path, topology)
        if found is None:
            raise ValueError(_no_checkpoint(path))
        with raise_on_all_ranks(f"claiming {output}"):
            later = [step for step in step_folders(own) if step > found.manifest.step] if own.is_dir() else []
            if topology.is_main_rank and later:
                raise ValueError(
                    f"{own} holds step_{later[0]}, later than {found.folder}: remove what is later, or give "
                    "this run another run.name"
                )
        return _logged(found, topology)
    with raise_on_all_ranks(f"claiming {output}"):
        if topology.is_main_rank:
            earlier = {own: sorted(path.name for path in own.glob("step_*"))}
            # Exports with a mark may be of this run, which was killed before its first checkpoint: that shows
            # when its models and data are known.
            exports = sorted(path.name for path in (output / EXPORTS).glob("step_*"))
            earlier[output / EXPORTS] = exports if wanted == "never" else unmarked_exports(output)
            for folder, names in earlier.items():
                if names:
                    raise ValueError(
                        f"{folder} holds {', '.join(names[:3])} of an earlier run: give this one another "
                        "run.name or run.output, or remove them"
                    )
    return None


def _refuse_old_names(output: Path) -> None:
    """Raise ValueError where a run folder has the names of versions before 0.2."""
    if not any((output / _OLD_FOLDER).glob("step_*")):
        return
    moves = [f"mv {output / _OLD_FOLDER} {output / FOLDER}"]
    if (output / FOLDER).exists():
        moves.insert(0, f"mv {output / FOLDER} {output / EXPORTS}")
    raise ValueError(
        f"{output} is a run folder of a version before 0.2, whose checkpoints lie in {_OLD_FOLDER}/ and "
        f"exports in {FOLDER}/: rename them with `{' && '.join(moves)}`"
    )


def _no_checkpoint(path: Path) -> str:
    """Return what a message says of `run.resume` that leads to no checkpoint."""
    if (path / "config.json").exists():
        return (
            f"run.resume is {path}, a Hugging Face folder, which holds weights alone: resume from one like "
            f"<run.output>/{FOLDER}/step_N, or start a new run with model.path={path}"
        )
    return f"run.resume is {path}: there is no checkpoint; give its folder, auto or never"


def _logged(found: Checkpoint, topology: Topology) -> Checkpoint:
    then = found.manifest.layout
    layout = "" if then == topology.layout else f", which was written in another layout ({then})"
    log(f"the run resumes from {found.folder}{layout}", topology)
    return found


@contextlib.contextmanager
def claim_outputs(config: Any, topology: Topology, *more: Path) -> Iterator[None]:
    """Hold the files that a command on records writes; a context manager that every rank enters, first.

    Args:
        config: of the command; `data.overwrite` decides whether files that exist are replaced. Without that
            key they are: scores follow from their input, while sampled answers may be all that is left.
        topology: layout and groups.
        more: further files, beside `config.out_path`.

    Raises:
        ValueError: a file exists, or another process writes it; on every rank.
        OSError: a folder cannot be made; on every rank a ValueError.
    """
    replaces = not hasattr(config.data, "overwrite") or config.data.overwrite
    with contextlib.ExitStack() as stack:
        with raise_on_all_ranks(f"claiming {config.out_path}"):
            for path in (config.out_path, *more) if topology.is_main_rank else ():
                _check_free(path, replaces=replaces)
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(one_writer(path))
                _check_free(path, replaces=replaces)  # its holder before has ended meanwhile
        yield


def _check_free(path: Path, *, replaces: bool) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise ValueError(f"{path} is {kind}, lines need a file: give another one")
    if not replaces:
        raise ValueError(
            f"{path} exists already: give another data.out or run.output, or set data.overwrite=true"
        )


def record_config(config: Any, topology: Topology) -> None:
    """Write the config of a command that was accepted to its run folder; every rank calls this.

    A command that does not train leaves the config of a training run as it is.

    Raises:
        ValueError: it cannot be written; on every rank.
    """
    output = Path(config.run.output)
    with raise_on_all_ranks(f"writing to {output}"):
        if topology.is_main_rank and (hasattr(config.run, "resume") or not (output / FOLDER).is_dir()):
            save_config(config, output)
