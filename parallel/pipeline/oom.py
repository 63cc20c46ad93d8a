"""Out-of-memory handling: a schedule fails on all ranks together, so that smaller micro-batches can be tried.

A rank that runs out of memory in a micro-batch computes nothing more in the schedule, but keeps sending its
pipeline neighbours zeros of the expected shapes. So every rank reaches the end of the schedule, where all
agree that it failed.

Tensor- and context-parallel ranks wait for each other inside a layer. They continue as above if all of them
ran out of memory between the same collectives, as equal devices with equal work do. If only one did, the
others are blocked in a collective that it cannot complete: that rank raises, and the launcher ends the run.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from glm_rlhf.parallel.megatron_compat.stores import num_collectives, world_store
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import ContextShard
from glm_rlhf.parallel.pipeline.multi_model import ScheduledMicroBatch
from glm_rlhf.parallel.runtime.topology import Topology

_PEERS_S = 5.0
"""How long a rank waits for its tensor- and context-parallel peers to report that they ran out too."""
_NO_FAILURE = 2**62
_num_failures: Counter[str] = Counter()


class OutOfMemory(Exception):
    """Raised on every rank of a schedule, at its end, if some rank ran out of memory."""

    def __init__(self, num_tokens: int, index: int | None) -> None:
        super().__init__(f"out of memory in a micro-batch of {num_tokens} tokens")
        self.num_tokens = num_tokens
        """Size of the failed micro-batch, the smallest over ranks; equal on all ranks."""
        self.index = index
        """Index of the failed micro-batch on this rank; None if none failed here."""


class OomGuard:
    """Owns the state of out-of-memory handling on this rank in one schedule."""

    def __init__(
        self, scheduled: Sequence[ScheduledMicroBatch], topology: Topology, *, is_final: bool
    ) -> None:
        """Start with no failure.

        Args:
            scheduled: the micro-batches of the schedule.
            topology: layout and groups.
            is_final: whether weights change, or reductions begin, before the end of the schedule, so that it
                cannot be repeated.
        """
        self._scheduled = scheduled
        self._num_tokens = [micro_batch.share.packed.num_tokens for micro_batch in scheduled]
        self._topology, self._is_final = topology, is_final
        self._newest = 0
        self._failed: int | None = None

    @property
    def has_failed(self) -> bool:
        """Whether memory has run out, so that only zeros are sent from here on."""
        return self._failed is not None

    @contextlib.contextmanager
    def guard(self, index: int | None = None) -> Iterator[None]:
        """Run a block of the schedule; an out-of-memory error in it fails the schedule.

        Args:
            index: position in the schedule of the block's micro-batch; None for the newest.

        Raises:
            ValueError: memory has run out where the other ranks cannot reach the end of the schedule.
        """
        self._newest = self._newest if index is None else index
        try:
            yield
        except torch.OutOfMemoryError as error:
            failed = self._newest
            if self._topology.layout.pp > 1:  # several are in flight: the largest must become smaller
                failed = max(range(len(self._num_tokens)), key=self._num_tokens.__getitem__)
            failure = (
                f"out of memory on rank {self._topology.rank} in a micro-batch of {self._num_tokens[failed]} "
                "tokens"
            )
            if self._is_final:
                raise ValueError(
                    f"{failure}, and the step cannot be repeated, since weights change or gradients are "
                    "reduced during backward: lower train.micro_batch_tokens, or set optimizer.in_backward "
                    f"and train.overlap_communication to false ({error})"
                ) from error
            if not has_failed_on_peers(
                self._topology.rank, (self._topology.tp_group, self._topology.cp_group)
            ):
                raise ValueError(
                    f"{failure}, but not on its tensor- and context-parallel peers, which now wait for it: "
                    "lower train.micro_batch_tokens; the same command resumes from the last checkpoint "
                    f"({error})"
                ) from error
            self._failed = failed

    def raise_if_failed(self, *, forward_only: bool) -> None:
        """Raise if any rank of the schedule ran out of memory; every rank of it calls this.

        All-reduces 8 bytes in the world, or with `forward_only` in each group of this copy of the model.

        Raises:
            OutOfMemory: memory ran out on some rank.
        """
        num_tokens = _NO_FAILURE if self._failed is None else self._num_tokens[self._failed]
        groups = groups_of(self._topology, forward_only=forward_only)
        if groups:
            smallest = torch.tensor([num_tokens], device=self._topology.device)
            for group in groups:
                dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
            num_tokens = int(smallest)
        if num_tokens == _NO_FAILURE:
            return
        if self._topology.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(num_tokens, None if self._failed is None else self._scheduled[self._failed].index)


def groups_of(topology: Topology, *, forward_only: bool) -> list[dist.ProcessGroup]:
    """Return the groups over which, one after the other, the ranks of a schedule exchange failures."""
    if not forward_only:
        return [dist.group.WORLD]
    return [group for group in (topology.tp_group, topology.cp_group, topology.pp_group) if group.size() > 1]


def zero_output(model: GLMModel, shard: ContextShard) -> torch.Tensor:
    """Return zeros in the shape of a chunk's output for a micro-batch, without an autograd graph."""
    config, layout = model.config, model.topology.layout
    num_rows = shard.positions_T.shape[0]
    if model.post_process:
        shape = (num_rows, config.hidden_size)
    else:
        shape = (num_rows // (layout.tp if config.sequence_parallel else 1), 1, config.hidden_size)
    return torch.zeros(shape, dtype=config.params_dtype, device=model.topology.device)


def has_failed_on_peers(rank: int, groups: Sequence[dist.ProcessGroup]) -> bool:
    """Return whether memory ran out on all ranks of the groups, at the same collective of each.

    Called after it has run out on this rank; waits some seconds for the others.

    Args:
        rank: of this process, in the world.
        groups: groups whose ranks wait for each other inside a layer.
    """
    store = dist.PrefixStore("out_of_memory", world_store())
    keys = []
    for group in groups:
        name = group.group_name
        _num_failures[name] += 1
        prefix = f"{name}/{_num_failures[name]}/{num_collectives(group)}"
        store.set(f"{prefix}/{rank}", "")
        keys += [f"{prefix}/{peer}" for peer in dist.get_process_group_ranks(group)]
    try:
        store.wait(keys, timedelta(seconds=_PEERS_S))
    except RuntimeError:  # DistStoreError, a FileStore's own error, or a closed store
        return False
    return True
