"""The newest complete checkpoint of a run, and a model's training state from it, in any layout."""

from pathlib import Path

import torch
import torch.distributed as dist

from glm_rlhf.parallel.checkpoint.save import TRACKER, recover_replaced, step_folders
from glm_rlhf.parallel.checkpoint.shards import frozen_weights, held_shards
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.optim.state_access import parts_of, resume_from, set_moments
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.sharding import HfSlice, ParamShard, read_shard
from glm_rlhf.parallel.spec.weight_map import SCALAR_BIAS
from glm_rlhf.parallel.storage.checkpoint_manifest import ADAM_MOMENTS, WEIGHT, CheckpointError
from glm_rlhf.parallel.storage.checkpoint_tensors import (
    Checkpoint,
    ShardedTensor,
    StoredShard,
    open_checkpoint,
)
from glm_rlhf.parallel.weights.load import part_of


def newest_checkpoint(folder: str | Path, *, topology: Topology) -> Checkpoint | None:
    """Return the newest complete checkpoint in a run's folder; every rank calls this.

    Each rank verifies the checksums of a part of the files. Rank 0 reports refused checkpoints with the
    reason, and a tracker that names another checkpoint, on stderr.

    Returns:
        None if there is no folder, or no checkpoint in it.

    Raises:
        CheckpointError: there are checkpoints, but none is complete.
    """
    folder = Path(folder)
    steps: list = [[]]
    if topology.is_main_rank:
        if folder.is_dir():
            recover_replaced(folder)
            steps[0] = list(step_folders(folder))
    dist.broadcast_object_list(steps, src=0)
    refusals = []
    for step in steps[0]:
        checkpoint, problem = _open(folder / f"step_{step}", topology)
        if problem is None:
            _report(folder, step, refusals, topology)
            return checkpoint
        refusals.append(problem)
    if refusals:
        raise CheckpointError(
            f"{folder} holds no complete checkpoint: {'; '.join(refusals)}; set run.resume to never and "
            "another run.name to start from the beginning"
        )
    return None


def checkpoint_at(path: str | Path, *, topology: Topology) -> Checkpoint:
    """Return the checkpoint in a folder after verifying its checksums; every rank calls this.

    Raises:
        CheckpointError: the folder is no checkpoint, or damaged; on every rank.
    """
    checkpoint, problem = _open(Path(path), topology)
    if problem is not None:
        raise CheckpointError(problem)
    return checkpoint


def _open(path: Path, topology: Topology) -> tuple[Checkpoint | None, str | None]:
    """Return a checkpoint, or the lowest rank's reason to refuse it."""
    checkpoint = problem = None
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.check_files(rank=topology.rank, world_size=topology.world_size)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(problems, problem)
    return checkpoint, next((problem for problem in problems if problem is not None), None)


def _report(folder: Path, step: int, refusals: list[str], topology: Topology) -> None:
    if not topology.is_main_rank:
        return
    for refusal in refusals:
        log(f"refused: {refusal}")
    tracked = _tracked(folder / TRACKER)
    if refusals or tracked != f"step_{step}":
        log(
            f"{folder / TRACKER} names {tracked or 'nothing'}; resuming from the newest complete checkpoint, "
            f"step_{step}"
        )


def _tracked(path: Path) -> str:
    """Return what the tracker says, for a message only; nothing decides by it."""
    if not path.is_file():  # a FIFO would wait for its writer
        return ""
    try:
        with path.open("rb") as file:
            text = file.read(100).decode("utf-8", errors="replace").strip()
    except OSError:
        return ""
    return text if text.isprintable() else repr(text)


@torch.no_grad()
def restore(state: AnyTrainingState, checkpoint: Checkpoint, model: str) -> None:
    """Restore weights and moments from a model of a checkpoint; every rank of the topology calls this.

    A rank reads the shards that it owns. In the layout that wrote the checkpoint, that is one range of a file
    per parameter; in another layout a shard is assembled from the stored parts that overlap it. The
    data-parallel group gathers the weights. The distributed optimizer and the optimizer in backward load each
    other's checkpoints.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    with raise_on_all_ranks(f"restoring {model} from {checkpoint.folder}"):
        info = checkpoint.manifest.models.get(model)
        if info is None:
            raise CheckpointError(
                f"{checkpoint.folder} holds {', '.join(checkpoint.manifest.models)} and no {model}: it was "
                "written by another command"
            )
        chunk = state.bare_chunks[0]
        role = part_of(chunk)["role"]
        if info.config.has_score_bias and SCALAR_BIAS not in info.frozen:
            raise CheckpointError(
                f"{checkpoint.folder} holds {SCALAR_BIAS} of {model} with its moments: versions before 0.2 "
                f"trained it in {info.config.family} models, this one does not; resume with the version that "
                "wrote it, or begin a new run from its weights"
            )
        if (info.config, info.role) != (chunk.glm, role):
            raise CheckpointError(
                f"{checkpoint.folder} holds a {info.role} {info.config}; the {model} of this run is a "
                f"{role} {chunk.glm}: resume with the model of the checkpoint"
            )
        held = {weight.name for weight, *_ in held_shards(state)}
        if held & set(info.frozen) != frozen_weights(state):
            raise CheckpointError(
                f"{checkpoint.folder} and this run train different weights of {model}; on this rank, "
                f"frozen there: {sorted(held & set(info.frozen))}, here: {sorted(frozen_weights(state))}"
            )
        sources = {WEIGHT: _Source(checkpoint, model, WEIGHT)}
        if info.has_moments:
            sources |= {kind: _Source(checkpoint, model, kind) for kind in ADAM_MOMENTS}
        shards = {shard.name: (shard, owner) for _, shard, owner in held_shards(state)}
        for part in parts_of(state):
            shard, owner = shards[part.name]
            span = part.start, part.stop
            part.weight.copy_(sources[WEIGHT].read(shard, owner, *span))
            if part.is_trained and info.has_moments:
                moments = {kind: sources[kind].read(shard, owner, *span) for kind in ADAM_MOMENTS}
                set_moments(part, moments, info.num_steps)
    resume_from(state, info.num_steps, info.gradient_squares)


class _Source:
    """The weights, or one kind of moments, of a model in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, model: str, kind: str) -> None:
        self._shards: dict[tuple[str, int], StoredShard] = checkpoint.shards(model, kind)
        self._tensors: dict[str, ShardedTensor] = checkpoint.tensors(model, kind)

    def read(self, shard: ParamShard, owner: int, start: int, stop: int) -> torch.Tensor:
        """Return elements of a flattened parameter as stored, a new CPU tensor [stop - start]."""
        stored = self._shards.get((shard.name, owner))
        if stored is not None and (stored.shard.pieces, stored.shard.shape) == (shard.pieces, shard.shape):
            out = torch.empty(stop - start, dtype=stored.dtype)
            stored.read(start, stop, out)
            return out
        return read_shard(shard, self._read_piece, dtype=torch.float32).view(-1)[start:stop].clone()

    def _read_piece(self, piece: HfSlice, out: torch.Tensor) -> None:
        whole = torch.empty(out.shape, dtype=out.dtype)
        self._tensors[piece.name].read_into(piece.dim, piece.start, piece.stop, whole)
        out.copy_(whole)
