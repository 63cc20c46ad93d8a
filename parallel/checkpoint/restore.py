"""The newest whole checkpoint of a run, and a model's training state from it, in whatever layout."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from glm_rlhf.parallel.checkpoint.save import TRACKER, recover_replaced, step_folders
from glm_rlhf.parallel.checkpoint.shards import frozen_weights, held_shards
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.optim.state_access import parts_of, resume_from, set_moments
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.sharding import HfSlice, ParamShard, read_shard
from glm_rlhf.parallel.storage.checkpoint_manifest import ADAM_MOMENTS, WEIGHT, CheckpointError
from glm_rlhf.parallel.storage.checkpoint_tensors import (
    Checkpoint,
    ShardedTensor,
    StoredShard,
    open_checkpoint,
)
from glm_rlhf.parallel.weights.load import part_of


def newest_checkpoint(folder: str | Path, *, topology: Topology) -> Checkpoint | None:
    """Return the newest checkpoint of a run's folder that is whole; every rank calls this.

    Checksums are compared, the files shared out over the ranks. What is refused, and why, and a tracker that
    names another checkpoint, is told on stderr by rank 0.

    Returns:
        None where there is no folder, or nothing in it bears a checkpoint's name.

    Raises:
        CheckpointError: there are checkpoints, none of them whole.
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
        found, fault = _try(folder / f"step_{step}", topology)
        if fault is None:
            _tell(folder, step, refusals, topology)
            return found
        refusals.append(fault)
    if refusals:
        raise CheckpointError(
            f"{folder} holds no whole checkpoint: {'; '.join(refusals)}; set run.resume to never and another "
            "run.name to start anew"
        )
    return None


def checkpoint_at(path: str | Path, *, topology: Topology) -> Checkpoint:
    """Return the checkpoint in a folder, its checksums compared; every rank calls this.

    Raises:
        CheckpointError: it is none, or damaged; on every rank.
    """
    found, fault = _try(Path(path), topology)
    if fault is not None:
        raise CheckpointError(fault)
    return found


def _try(path: Path, topology: Topology) -> tuple[Checkpoint | None, str | None]:
    """Return a checkpoint, or the first rank's reason to refuse it."""
    found = fault = None
    try:
        found = open_checkpoint(path)
        found.check_files(rank=topology.rank, world_size=topology.world_size)
    except (CheckpointError, OSError) as error:
        fault = str(error)
    faults: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(faults, fault)
    return found, next((fault for fault in faults if fault is not None), None)


def _tell(folder: Path, step: int, refusals: list[str], topology: Topology) -> None:
    if not topology.is_main_rank:
        return
    for refusal in refusals:
        sys.stderr.write(f"refused: {refusal}\n")
    try:
        tracked = (folder / TRACKER).read_bytes()[:100].decode("utf-8", errors="replace").strip()
    except OSError:
        tracked = ""
    if refusals or tracked != f"step_{step}":
        sys.stderr.write(
            f"{folder / TRACKER} names {tracked or 'nothing'}; the newest whole checkpoint is step_{step}, "
            "it is taken\n"
        )


@torch.no_grad()
def restore(state: AnyTrainingState, checkpoint: Checkpoint, model: str) -> None:
    """Fill weights and moments from a model of a checkpoint; every rank of the topology calls this.

    A rank reads what it owns. In the layout that wrote it, that is one stretch of a file for each parameter;
    in another one the parameter is put together from the parts that overlap it. The data-parallel group
    gathers the weights. The ordinary optimizer and the one in backward load each other's.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    with raise_on_all_ranks(f"restoring {model} from {checkpoint.folder}"):
        facts = checkpoint.manifest.models.get(model)
        if facts is None:
            raise CheckpointError(
                f"{checkpoint.folder} holds {', '.join(checkpoint.manifest.models)} and no {model}: it was "
                "written by another command"
            )
        chunk = state.bare_chunks[0]
        role = part_of(chunk)["role"]
        if (facts.config, facts.role) != (chunk.glm, role):
            raise CheckpointError(
                f"{checkpoint.folder} holds a {facts.role} {facts.config}; the {model} of this run is a "
                f"{role} {chunk.glm}: resume with the model that it was trained from"
            )
        held = {weight.name for weight, *_ in held_shards(state)}
        if held & set(facts.frozen) != frozen_weights(state):
            raise CheckpointError(
                f"{checkpoint.folder} and this run train different weights of {model}; on this rank, "
                f"frozen there: {sorted(held & set(facts.frozen))}, here: {sorted(frozen_weights(state))}"
            )
        sources = {WEIGHT: _Source(checkpoint, model, WEIGHT)}
        if facts.has_moments:
            sources |= {kind: _Source(checkpoint, model, kind) for kind in ADAM_MOMENTS}
        shards = {shard.name: (shard, holder) for _, shard, holder in held_shards(state)}
        for part in parts_of(state):
            shard, holder = shards[part.name]
            span = part.start, part.stop
            part.weight.copy_(sources[WEIGHT].read(shard, holder, *span))
            if part.is_trained and facts.has_moments:
                moments = {kind: sources[kind].read(shard, holder, *span) for kind in ADAM_MOMENTS}
                set_moments(part, moments, facts.num_steps)
    resume_from(state, facts.num_steps, facts.gradient_squares)


class _Source:
    """One kind of tensors of a model in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, model: str, kind: str) -> None:
        self._shards: dict[tuple[str, int], StoredShard] = checkpoint.shards(model, kind)
        self._tensors: dict[str, ShardedTensor] = checkpoint.tensors(model, kind)

    def read(self, shard: ParamShard, holder: int, start: int, stop: int) -> torch.Tensor:
        """Return elements of a flattened parameter, a new CPU tensor [stop - start], as they are stored."""
        stored = self._shards.get((shard.name, holder))
        if stored is not None and stored.shard.pieces == shard.pieces:
            out = torch.empty(stop - start, dtype=stored.dtype)
            stored.read(start, stop, out)
            return out
        return read_shard(shard, self._read_piece, dtype=torch.float32).view(-1)[start:stop].clone()

    def _read_piece(self, piece: HfSlice, out: torch.Tensor) -> None:
        whole = torch.empty(out.shape, dtype=out.dtype)
        self._tensors[piece.name].read_into(piece.dim, piece.start, piece.stop, whole)
        out.copy_(whole)
