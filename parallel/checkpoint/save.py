"""Atomic checkpoints, written in the background while training continues.

A save keeps references to the tensors and returns. A thread copies them to host memory; meanwhile they must
not change, so the optimizer waits for the copy before its next step. Then each rank writes its file; when all
are on disk, rank 0 writes the manifest, renames the folder to its final name, and updates the tracker. A kill
at any time leaves earlier checkpoints unchanged, and at most a hidden folder that the next run removes.
"""

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glm_rlhf.parallel.checkpoint.shards import joined_info, model_info, stored_tensors
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.optim.state_shard import SplitMaster
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.preemption import ends_at_once
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_manifest import (
    FILE_NAME,
    FORMAT,
    CheckpointError,
    FileInfo,
    Manifest,
    ModelInfo,
    RankFile,
    current_versions,
    manifest_bytes,
    rank_file_name,
)
from glm_rlhf.parallel.storage.checkpoint_tensors import tensor_name
from glm_rlhf.parallel.storage.durable_io import (
    name_in_errors,
    remove,
    replace_file,
    sync,
    write_all,
    write_synced,
)
from glm_rlhf.parallel.storage.safetensors_format import HeaderEntry, plan_file
from glm_rlhf.parallel.storage.writer_lock import one_writer

TRACKER = "latest"
"""File next to the checkpoints with the name of the last one written."""

_STEP = re.compile(r"step_(\d{1,18})")
_LEFTOVER = re.compile(r"\.step_(\d+)\.(partial|replaced|removed)")
_JOIN_TIMEOUT_S = 60.0


def recover_replaced(folder: Path) -> None:
    """Rename a checkpoint back whose replacement was interrupted by a kill between the two renames."""
    for path in folder.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and match[2] == "replaced":
            name = folder / f"step_{match[1]}"
            if not os.path.lexists(name):
                with contextlib.suppress(OSError):  # a read-only folder: earlier checkpoints remain
                    os.rename(path, name)


def step_folders(folder: Path) -> dict[int, Path]:
    """Return the folders with a checkpoint's name, newest first, complete or not."""
    names = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted(((int(match[1]), path) for match, path in names if match), reverse=True))


class CheckpointWriter:
    """Owns the folder of a run's checkpoints, the host memory that they are staged in, and the thread.

    Every rank makes one and calls its methods together. As a context manager it waits at its end for the last
    save, and raises its failure.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        topology: Topology,
        keep_last: int,
        keep_every: int = 0,
        is_async: bool = True,
        config: Mapping[str, Any] | None = None,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Create the folder, and remove leftovers of killed saves.

        Args:
            folder: of the checkpoints `step_N`, visible to all ranks.
            topology: of the models.
            keep_last: number of newest checkpoints to keep.
            keep_every: also keep checkpoints of steps that are a multiple of this; 0 for none.
            is_async: whether `save` returns before the checkpoint is written.
            config: settings of the run for the manifest, JSON values.
            extra_files: further files by name, such as the tokenizer's; those of rank 0 are written.

        Raises:
            ValueError: the folder cannot be created, or another process saves into it.
        """
        self.folder, self.topology = Path(folder), topology
        self.keep_last, self.keep_every, self.is_async = keep_last, keep_every, is_async
        self.config, self.extra_files = dict(config or {}), dict(extra_files or {})
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._memory: torch.Tensor | None = None
        self._lock = contextlib.ExitStack()
        # The thread uses a separate group, so that it can communicate while the run does.
        self._thread_group, self._group = (dist.new_group(backend="gloo") for _ in range(2))
        with raise_on_all_ranks(f"creating {self.folder}"):
            if topology.is_main_rank:
                self._claim()

    def _claim(self) -> None:
        """Take the folder, which this writer holds to its end, without what killed saves left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_writer(self.folder, is_inside=True))
            for path in list(self.folder.iterdir()):
                if _LEFTOVER.fullmatch(path.name):
                    remove(path)
            tracker = self.folder / TRACKER
            if os.path.lexists(tracker) and not tracker.is_file():
                raise CheckpointError(f"{tracker} is not a regular file: remove it")
            self._lock = stack.pop_all()

    def save(
        self,
        step: int,
        models: Mapping[str, AnyTrainingState],
        *,
        state: Mapping[str, Any],
        rank_tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the checkpoint of a step; every rank calls this. Waits for a save in progress first.

        Args:
            step: completed steps of the run.
            models: by name; read as a model folder, the checkpoint is the first model.
            state: further state of the run, JSON values; that of rank 0 is written.
            rank_tensors: tensors of this rank alone, by name; copied at once.

        Raises:
            CheckpointError, ValueError: this save (if synchronous) or the previous one failed.
        """
        self.finish()
        job = self._plan(step, models, state, rank_tensors or {})
        self._staged.clear()
        for training in models.values():
            training.wait_for_readers = self._staged.wait
        if not self.is_async:
            self._run(job)
            self.finish()
            return
        thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint step {step}")
        thread.daemon = True  # a failing process may exit at once, without this checkpoint
        self._thread = thread
        try:
            thread.start()
        except BaseException:  # a Ctrl-C as it starts: nobody would stage a save that has not begun
            if thread.ident is None:
                self._thread = None
                self._staged.set()
            raise

    def poll(self) -> None:
        """Raise the failure of a finished save; every rank calls this, about once per step.

        During a save this is one small all-reduce of the world.

        Raises:
            CheckpointError, ValueError: the save failed; on every rank.
        """
        if self._thread is None:
            return
        is_done = torch.tensor([int(not self._thread.is_alive())])
        dist.all_reduce(is_done, op=dist.ReduceOp.MIN, group=self._group)
        if int(is_done):
            self.finish()

    def main_rank_says(self, is_true: bool) -> bool:
        """Return rank 0's answer to a question on which clocks may differ; every rank calls this.

        One byte is broadcast, over gloo.
        """
        answer = torch.tensor([is_true])
        dist.broadcast(answer, src=0, group=self._group)
        return bool(answer)

    def finish(self) -> None:
        """Wait for a save in progress; every rank calls this.

        Raises:
            CheckpointError, ValueError: the save failed; on every rank.
        """
        if self._thread is not None:
            self._thread.join()
        elif self._error is None:
            return
        error, self._thread, self._error = self._error, None, None
        with raise_on_all_ranks("writing a checkpoint", group=self._group):
            if error is not None:
                raise error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._lock:
            self._finish_or_abandon(kind)

    def _finish_or_abandon(self, kind: type | None) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:
            if ends_at_once():  # the thread uses the groups
                return
            self._thread.join(_JOIN_TIMEOUT_S)  # the exception that ends the run is the one to report
            if self._thread.is_alive():  # other ranks have exited; the group is in use
                return
        for group in (self._thread_group, self._group):
            dist.destroy_process_group(group)

    def _plan(
        self,
        step: int,
        models: Mapping[str, AnyTrainingState],
        state: Mapping[str, Any],
        rank_tensors: Mapping[str, torch.Tensor],
    ) -> "_Job":
        tensors = {tensor_name("rank", "", name): value.clone() for name, value in rank_tensors.items()}
        starts = {}
        for model, training in models.items():
            model_tensors, starts[model] = stored_tensors(model, training)
            tensors |= model_tensors
        prefix, entries = plan_file({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        device = self.topology.device
        return _Job(
            step=step,
            prefix=prefix,
            entries=entries,
            tensors=tensors,
            starts=starts,
            models={model: model_info(training) for model, training in models.items()},
            state=dict(state),
            ready=torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None,
        )

    def _run(self, job: "_Job") -> None:
        partial = self.folder / f".step_{job.step}.partial"
        try:
            self._write(job, partial)
        except Exception as error:
            self._error = error
            if self.topology.is_main_rank:
                shutil.rmtree(partial, ignore_errors=True)

    def _write(self, job: "_Job", partial: Path) -> None:
        """Write a checkpoint; all ranks' threads call this together, and each stage must succeed on all."""
        # Why this order: a folder named `step_N` must be complete at any kill. So all ranks first write and
        # fsync their files in a hidden folder. Only when every rank has reported its checksum does rank 0
        # write the manifest and rename the folder: the rename is the commit. The tracker is updated after
        # it, so that it never names a missing folder, and old checkpoints are removed last. Staging to host
        # memory comes first, to let the optimizer continue as early as possible.
        with self._all_ranks(job):
            try:
                content = self._stage(job)
            finally:
                self._staged.set()
            if self.topology.is_main_rank:
                remove(partial)
                partial.mkdir()
        with self._all_ranks(job):
            info = _write_file(partial / rank_file_name(self.topology.rank), content)
        local = RankFile(facts=info, tp_rank=self.topology.tp_rank, starts=job.starts), job.models
        per_rank: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(per_rank, local, group=self._thread_group)
        with self._all_ranks(job):
            if self.topology.is_main_rank:
                self._commit(job, partial, per_rank)

    @contextlib.contextmanager
    def _all_ranks(self, job: "_Job"):
        with raise_on_all_ranks(f"writing the checkpoint of step {job.step}", group=self._thread_group):
            try:
                yield
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint of step {job.step} was not written: {error.filename or self.folder}: "
                    f"{error.strerror}; earlier ones are complete, free space or repair the folder"
                ) from error

    def _stage(self, job: "_Job") -> memoryview:
        """Return the content of this rank's file, in host memory that the next save reuses."""
        is_cuda = self.topology.device.type == "cuda"
        num_bytes = len(job.prefix) + sum(entry.num_bytes for entry in job.entries.values())
        if self._memory is None or self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        memory = self._memory[:num_bytes]
        memory[: len(job.prefix)] = torch.frombuffer(bytearray(job.prefix), dtype=torch.uint8)
        with contextlib.ExitStack() as stack:
            if is_cuda:
                torch.cuda.set_device(self.topology.device)
                stream = torch.cuda.Stream()
                stream.wait_event(job.ready)
                stack.enter_context(torch.cuda.stream(stream))
            for name, entry in job.entries.items():
                values = job.tensors[name]
                if isinstance(values, SplitMaster):  # joined one at a time, to save memory
                    values = values.joined()
                target = memory[entry.offset : entry.offset + entry.num_bytes].view(values.dtype)
                target.copy_(values.reshape(-1), non_blocking=is_cuda)
            if is_cuda:
                stream.synchronize()
        job.tensors.clear()
        return memoryview(memory.numpy())

    def _commit(self, job: "_Job", partial: Path, per_rank: list[tuple[RankFile, dict]]) -> None:
        for name, content in self.extra_files.items():
            write_synced(partial / name, content)
        manifest = Manifest(
            format=FORMAT,
            step=job.step,
            layout=self.topology.layout,
            world_size=self.topology.world_size,
            versions=current_versions(),
            models={model: joined_info([models[model] for _, models in per_rank]) for model in job.models},
            ranks=tuple(file for file, _ in per_rank),
            extra_files={
                name: FileInfo(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
                for name, content in self.extra_files.items()
            },
            config=self.config,
            state=job.state,
        )
        write_synced(partial / FILE_NAME, manifest_bytes(manifest))
        sync(partial)
        target = self.folder / f"step_{job.step}"
        replaced = self.folder / f".step_{job.step}.replaced"
        if os.path.lexists(target):  # saved earlier in this step, or damaged and skipped on resuming
            os.rename(target, replaced)
        os.rename(partial, target)
        sync(self.folder)
        replace_file(self.folder / TRACKER, f"{target.name}\n".encode())
        with contextlib.suppress(OSError):
            remove(replaced)
        self._remove_old()

    def _remove_old(self) -> None:
        for age, (step, path) in enumerate(step_folders(self.folder).items()):
            is_kept = age < self.keep_last or (self.keep_every > 0 and step % self.keep_every == 0)
            if not is_kept:
                removed = self.folder / f".step_{step}.removed"
                os.rename(path, removed)  # a kill during the removal leaves no incomplete checkpoint
                remove(removed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One save of this rank."""

    step: int
    prefix: bytes
    entries: Mapping[str, HeaderEntry]
    tensors: dict[str, torch.Tensor | SplitMaster]
    starts: dict[str, dict[str, int]]
    models: dict[str, ModelInfo]
    state: dict[str, Any]
    ready: object | None


def _write_file(path: Path, content: memoryview) -> FileInfo:
    digest = hashlib.sha256()
    with name_in_errors(path), path.open("xb", buffering=0) as file:
        write_all(file.fileno(), content, 0, on_block=digest.update)
        os.fsync(file.fileno())
    return FileInfo(num_bytes=len(content), sha256=digest.hexdigest())
