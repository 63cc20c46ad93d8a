"""When a run's checkpoints are written, and what a run resumes from."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from glm_rlhf.engine.runs.exports import RunExports
from glm_rlhf.engine.runs.fingerprint import check_same_run, contents_not_in, run_fingerprint
from glm_rlhf.parallel.checkpoint.restore import checkpoint_at, newest_checkpoint, restore
from glm_rlhf.parallel.checkpoint.save import CheckpointWriter
from glm_rlhf.parallel.megatron_compat.rng_state import random_state, set_random_state
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_manifest import is_checkpoint
from glm_rlhf.parallel.storage.checkpoint_tensors import Checkpoint
from glm_rlhf.parallel.weights.hf_writer import read_extra_files

FOLDER = "checkpoints"
"""Folder, in a run folder, of what the run resumes from."""
IS_INSIDE = "is_inside"
"""Entry of a run's progress that is true where it was left before the end of the checkpoint's step."""
UNREPORTED = "unreported"
"""Entry of a run's progress with the metrics of the checkpoint's step, where that is not evaluated yet."""


class SavedRun(Protocol):
    """The part of a command's settings that checkpoints depend on."""

    @property
    def run(self) -> Any:
        """Where the run keeps its files."""

    @property
    def train(self) -> Any:
        """When it saves and exports."""

    @property
    def model(self) -> Any:
        """What it started from."""

    @property
    def parallel(self) -> Any:
        """Its layout, and how long ranks wait for each other."""


def find_checkpoint(path: Path, topology: Topology) -> Checkpoint | None:
    """Return the checkpoint at a path, or the newest whole one in a folder of them; None where there is none.

    Every rank calls this.

    Raises:
        CheckpointError: it is damaged, or none in the folder is whole; on every rank.
    """
    find = checkpoint_at if is_checkpoint(path) else newest_checkpoint
    return find(path, topology=topology)


def is_same_layout(found: Checkpoint, topology: Topology) -> bool:
    """Return whether a checkpoint was written by as many ranks in the same places."""
    manifest = found.manifest
    return (manifest.layout, manifest.world_size) == (topology.layout, topology.world_size)


class RunCheckpoints:
    """Owns the checkpoints of a run: what is saved when, and the Hugging Face folders."""

    def __init__(
        self,
        config: SavedRun,
        models: Mapping[str, AnyTrainingState],
        writer: CheckpointWriter,
        *,
        identity: Mapping[str, Any],
        export: Callable[[Path], None],
        topology: Topology,
    ) -> None:
        self.config, self.models, self.writer = config, dict(models), writer
        self.identity, self.topology = dict(identity), topology
        self.exports = RunExports(
            config.run.output,
            run=run_fingerprint(_as_json(config), identity),
            export=export,
            topology=topology,
        )
        self._saved_step: int | None = None
        self._saved_s = time.monotonic()

    def keep(self, step: int) -> None:
        """Know that this step is saved already: the run resumes from it."""
        self._saved_step = step

    def after_step(
        self,
        step: int,
        progress: Mapping[str, Any],
        *,
        rank_tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> bool:
        """Save and export what is due after a step; every rank calls this. Return whether anything was.

        Args:
            step: steps of the run so far.
            progress: what the loop resumes from, JSON values.
            rank_tensors: what else this rank resumes from.

        Raises:
            ValueError: this save, or the one before it, failed; on every rank.
        """
        train = self.config.train
        is_last = step >= train.steps
        self.writer.poll()
        exports = is_due(step, train.export_every, is_last)
        saves = is_due(step, train.save_every, is_last) or self._is_time_due()
        if saves:
            self._save(step, progress, rank_tensors)
        if saves and is_last:
            self.writer.finish()
        if exports:
            for training in self.models.values():
                training.gather_weights()
            self._export(step)
        return saves or exports

    def save_and_exit(
        self,
        step: int,
        progress: Mapping[str, Any],
        *,
        rank_tensors: Mapping[str, torch.Tensor] | None = None,
        is_inside: bool = False,
    ) -> None:
        """Save what `after_step` of this step did not, for a run that ends early; every rank calls this.

        Args:
            step: the newest step.
            progress, rank_tensors: as of `after_step`.
            is_inside: whether the run is left before this step's end.

        Raises:
            ValueError: this save, or the one before it, failed; on every rank.
        """
        self.writer.poll()
        if step and self._saved_step != step:
            self._save(step, progress, rank_tensors)
        self.writer.finish()
        where = "inside" if is_inside else "after"
        log(f"left {where} step {step} of {self.config.train.steps}, as a signal asked", self.topology)

    def _save(
        self, step: int, progress: Mapping[str, Any], rank_tensors: Mapping[str, torch.Tensor] | None
    ) -> None:
        self.writer.save(
            step,
            self.models,
            state={"identity": self.identity, "progress": dict(progress)},
            rank_tensors=random_state() | dict(rank_tensors or {}),
        )
        self._saved_step, self._saved_s = step, time.monotonic()

    def _is_time_due(self) -> bool:
        """Return whether the last save, or the start, is long ago by rank 0's clock; all ranks call this."""
        every_s = self.config.train.save_every_s
        return every_s > 0 and self.writer.main_rank_says(time.monotonic() - self._saved_s >= every_s)

    def export_missed(self, step: int) -> None:
        """Export the step that a run resumes from, if it was killed between its checkpoint and its export."""
        is_own = step > 0 and self._saved_step == step
        if (
            is_own
            and is_due(step, self.config.train.export_every, False)
            and not self.exports.has(_export_name(step))
        ):
            self._export(step)

    def close_finished(self, step: int) -> None:
        """Export the last step, unless an earlier attempt has; for a run that has nothing left to train."""
        if not self.exports.has(_export_name(step)):
            self._export(step)
        log(
            f"step {step} of {self.config.train.steps} is reached already, nothing is left to train: "
            "raise train.steps, or give another run.name",
            self.topology,
        )

    def _export(self, step: int) -> None:
        self.exports.write(_export_name(step), step=step)


def _export_name(step: int) -> str:
    return f"step_{step}"


def _as_json(config: SavedRun) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(cast(Any, config))))


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Return whether something happens after a step: after every so many (0: none), and after the last."""
    return is_last or (every > 0 and step % every == 0)


@contextlib.contextmanager
def open_checkpoints(
    config: SavedRun,
    models: Mapping[str, AnyTrainingState],
    *,
    identity: Mapping[str, Any],
    export: Callable[[Path], None],
    topology: Topology,
) -> Iterator[RunCheckpoints]:
    """Return, as a context manager, what saves a run; every rank enters.

    Args:
        config: of the run.
        models: what is trained, by name; the first is what a checkpoint is as a model folder.
        identity: what may not change between a run and its resumption, JSON values.
        export: writes the Hugging Face folder that it is given.
        topology: layout and groups.

    Raises:
        ValueError: the folder cannot be made, or the last save failed.
    """
    train = config.train
    with open_writer(
        Path(config.run.output) / FOLDER,
        config,
        models,
        topology=topology,
        keep_last=train.keep_last,
        keep_every=train.keep_every,
        is_async=train.async_save,
    ) as writer:
        yield RunCheckpoints(config, models, writer, identity=identity, export=export, topology=topology)


def open_writer(
    folder: Path,
    config: SavedRun,
    models: Mapping[str, AnyTrainingState],
    *,
    topology: Topology,
    **options: Any,
) -> CheckpointWriter:
    """Return what writes a run's checkpoints into a folder, a context manager; every rank calls this.

    Args:
        folder: of the checkpoints.
        config: of the run; a checkpoint as a model folder has what lies beside the weights of `model.path`.
        models: what is trained, by name.
        topology: layout and groups.
        options: of the writer: `keep_last`, `keep_every`, `is_async`.

    Raises:
        ValueError: the folder cannot be made.
    """
    chunk = next(iter(models.values())).bare_chunks[0]
    with raise_on_all_ranks(f"reading {config.model.path}"):
        extra_files = {}
        if topology.is_main_rank:
            extra_files = read_extra_files(
                config.model.path, chunk.glm, dtype=chunk.config.params_dtype, role=chunk.role
            )
    settings = _as_json(config)
    return CheckpointWriter(folder, topology=topology, config=settings, extra_files=extra_files, **options)


def resume(checkpoint: Checkpoint, checkpoints: RunCheckpoints) -> dict[str, Any]:
    """Bring models, optimizers and random generators to a checkpoint; return the loop's progress.

    Every rank calls this. Random generators continue where the layout is the same.

    Raises:
        ValueError: the checkpoint is of another run, or of other models.
    """
    progress = checkpoint.manifest.state.get("progress")
    if not isinstance(progress, dict) or type(progress.get("step")) is not int:
        raise ValueError(
            f"{checkpoint.folder} is of no command's run: it does not say how far the run was; resume from a "
            "checkpoint of this command, or load it with PPOEngine.load"
        )
    is_whole_step = not progress.get(IS_INSIDE)
    if is_whole_step and checkpoint.folder.parent == Path(checkpoints.config.run.output) / FOLDER:
        checkpoints.keep(checkpoint.manifest.step)
    return restore_run(
        checkpoint,
        checkpoints.models,
        config=checkpoints.config,
        identity=checkpoints.identity,
        topology=checkpoints.topology,
    )


def restore_run(
    checkpoint: Checkpoint,
    models: Mapping[str, AnyTrainingState],
    *,
    config: SavedRun,
    identity: Mapping[str, Any],
    topology: Topology,
) -> dict[str, Any]:
    """Bring models, optimizers and random generators to a checkpoint; return the progress saved in it.

    Every rank calls this. Random generators continue where the layout is the same.

    Args:
        origin: the checkpoint.
        models: what is trained, by name.
        config: settings of the run, which may differ in few ways from those then.
        identity: fingerprints of what may not differ, on the reporter.
        topology: layout and groups.

    Raises:
        ValueError: the checkpoint is of another run, or of other models.
    """
    manifest = checkpoint.manifest
    with raise_on_all_ranks(f"resuming from {checkpoint.folder}"):
        changed = check_same_run(
            checkpoint.folder,
            manifest.config,
            _as_json(config),
            manifest.state.get("identity", {}),
            identity if topology.is_main_rank else None,
        )
        if uncompared := contents_not_in(manifest.state.get("identity", {}), identity):
            log(
                f"{checkpoint.folder} was written before contents were compared: whether "
                f"{' and '.join(uncompared)} holds what it held then is not known",
                topology,
            )
    if changed:
        log(f"{'; '.join(changed)}: from here on the run has not the bits it would have had", topology)
    for name, training in models.items():
        restore(training, checkpoint, name)
    if is_same_layout(checkpoint, topology):
        with raise_on_all_ranks(f"resuming from {checkpoint.folder}"):
            set_random_state(checkpoint.rank_tensors(topology.rank))
    return manifest.state.get("progress", {})
