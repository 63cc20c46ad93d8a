"""Checkpoints written while training goes on, each of them whole or not there.

A save takes hold of the tensors and returns. A thread copies them to host memory, during which they must
not change: the optimizer waits for it before its next step. Then each rank writes its file; when all are on
the disk, rank 0 writes the manifest, gives the folder its name, and points the tracker at it. A kill at any
moment leaves the earlier checkpoints as they were, and at most a hidden folder that the next run removes.
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

from glm_rlhf.parallel.checkpoint.shards import facts_of, joined_facts, stored_tensors
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.optim.state_shard import SplitMaster
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
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
from glm_rlhf.parallel.storage.durable_io import replace_file, sync, write_all, write_synced
from glm_rlhf.parallel.storage.safetensors_format import HeaderEntry, plan_file

TRACKER = "latest"
"""File beside the checkpoints with the name of the one that was written last."""

_STEP = re.compile(r"step_(\d{1,18})")
_LEFTOVER = re.compile(r"\.step_(\d+)\.(partial|replaced|removed)")
_JOIN_TIMEOUT_S = 60.0


def recover_replaced(folder: Path) -> None:
    """Give a checkpoint its name back that a kill found between giving way and being replaced."""
    for path in folder.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and match[2] == "replaced":
            name = folder / f"step_{match[1]}"
            if not os.path.lexists(name):
                with contextlib.suppress(OSError):  # read-only: the ones before it are there
                    os.rename(path, name)


def step_folders(folder: Path) -> dict[int, Path]:
    """Return what bears a checkpoint's name in a folder, newest first; sound or not."""
    names = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted(((int(match[1]), path) for match, path in names if match), reverse=True))


class CheckpointWriter:
    """Owns the folder of a run's checkpoints, the host memory that they are staged in, and the thread.

    Every rank makes one and calls its methods together. A context manager: at its end the last save is
    waited for, and its failure raised.
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
        """Make the folder, and remove what a kill has left in it.

        Args:
            folder: of the checkpoints `step_N`, seen by all ranks.
            topology: of the models.
            keep_last: newest checkpoints that stay.
            keep_every: those of steps that are a multiple stay too; 0 for none.
            is_async: whether `save` returns before the checkpoint is written.
            config: settings of the run for the manifest, JSON values.
            extra_files: further files by name, such as the tokenizer's; rank 0's count.

        Raises:
            ValueError: the folder cannot be made.
        """
        self.folder, self.topology = Path(folder), topology
        self.keep_last, self.keep_every, self.is_async = keep_last, keep_every, is_async
        self.config, self.extra_files = dict(config or {}), dict(extra_files or {})
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._memory: torch.Tensor | None = None
        # The thread has a group of its own, so that it may communicate while the run does.
        self._thread_group, self._group = (dist.new_group(backend="gloo") for _ in range(2))
        with raise_on_all_ranks(f"making {self.folder}"):
            if topology.is_main_rank:
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.iterdir():
                    if _LEFTOVER.fullmatch(path.name):
                        shutil.rmtree(path)

    def save(
        self,
        step: int,
        models: Mapping[str, AnyTrainingState],
        *,
        state: Mapping[str, Any],
        rank_tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the checkpoint of a step; every rank calls this. One that is under way is waited for.

        Args:
            step: steps of the run behind it.
            models: by name; the first is what the folder is as a model folder.
            state: what else the run needs, JSON values; rank 0's count.
            rank_tensors: of this rank alone, by name; they are copied at once.

        Raises:
            CheckpointError, ValueError: this save (not asynchronous) or the one before it failed.
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
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint step {step}")
        self._thread.daemon = True  # the process may end at once on a fault; the checkpoint is then not there
        self._thread.start()

    def poll(self) -> None:
        """Raise the failure of a save that has ended since; every rank calls this, once a step or so.

        While a save is under way one small all-reduce of the world.

        Raises:
            CheckpointError, ValueError: it failed; on every rank.
        """
        if self._thread is None:
            return
        is_done = torch.tensor([int(not self._thread.is_alive())])
        dist.all_reduce(is_done, op=dist.ReduceOp.MIN, group=self._group)
        if int(is_done):
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way; every rank calls this.

        Raises:
            CheckpointError, ValueError: it failed; on every rank.
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
        if kind is None:
            self.finish()
        elif self._thread is not None:
            self._thread.join(_JOIN_TIMEOUT_S)  # the fault that ends the run is the one to tell
            if self._thread.is_alive():  # other ranks are gone; its group is in use
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
            found, starts[model] = stored_tensors(model, training)
            tensors |= found
        prefix, entries = plan_file({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        device = self.topology.device
        return _Job(
            step=step,
            prefix=prefix,
            entries=entries,
            tensors=tensors,
            starts=starts,
            models={model: facts_of(training) for model, training in models.items()},
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
        """Go from tensors to a checkpoint; all ranks' threads together, each step agreed upon by all."""
        with self._agreed(job):
            try:
                content = self._stage(job)
            finally:
                self._staged.set()
            if self.topology.is_main_rank:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
        with self._agreed(job):
            facts = _write_file(partial / rank_file_name(self.topology.rank), content)
        mine = RankFile(facts=facts, tp_rank=self.topology.tp_rank, starts=job.starts), job.models
        everyone: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(everyone, mine, group=self._thread_group)
        with self._agreed(job):
            if self.topology.is_main_rank:
                self._commit(job, partial, everyone)

    @contextlib.contextmanager
    def _agreed(self, job: "_Job"):
        with raise_on_all_ranks(f"writing the checkpoint of step {job.step}", group=self._thread_group):
            try:
                yield
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint of step {job.step} was not written: {error.filename or self.folder}: "
                    f"{error.strerror}; earlier ones are whole, make room or mend the folder"
                ) from error

    def _stage(self, job: "_Job") -> memoryview:
        """Return the content of this rank's file, in host memory that the next save uses again."""
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
                if isinstance(values, SplitMaster):  # made here, one at a time: a save needs no more memory
                    values = values.joined()
                target = memory[entry.offset : entry.offset + entry.num_bytes].view(values.dtype)
                target.copy_(values.reshape(-1), non_blocking=is_cuda)
            if is_cuda:
                stream.synchronize()
        job.tensors.clear()
        return memoryview(memory.numpy())

    def _commit(self, job: "_Job", partial: Path, everyone: list[tuple[RankFile, dict]]) -> None:
        for name, content in self.extra_files.items():
            write_synced(partial / name, content)
        manifest = Manifest(
            format=FORMAT,
            step=job.step,
            layout=self.topology.layout,
            world_size=self.topology.world_size,
            versions=current_versions(),
            models={model: joined_facts([models[model] for _, models in everyone]) for model in job.models},
            ranks=tuple(file for file, _ in everyone),
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
        if os.path.lexists(target):  # one inside this step, or a damaged one that the run went back behind
            os.rename(target, replaced)
        os.rename(partial, target)
        sync(self.folder)
        replace_file(self.folder / TRACKER, f"{target.name}\n".encode())
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_old()

    def _remove_old(self) -> None:
        for place, (step, path) in enumerate(step_folders(self.folder).items()):
            is_kept = place < self.keep_last or (self.keep_every > 0 and step % self.keep_every == 0)
            if not is_kept:
                removed = self.folder / f".step_{step}.removed"
                os.rename(path, removed)  # at once not a checkpoint any more
                shutil.rmtree(removed)


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
    with path.open("xb", buffering=0) as file:
        write_all(file.fileno(), content, 0, on_block=digest.update)
        os.fsync(file.fileno())
    return FileInfo(num_bytes=len(content), sha256=digest.hexdigest())
