"""A schedule in which memory runs out ends on every rank alike, so that it can be run again on less.

A rank whose memory runs out in a micro-batch drops what it can of the schedule and computes nothing more in
it, but goes on sending its pipeline neighbours what they wait for, zeros of the right shape. So every rank
comes to the schedule's end, where all agree that it failed.

Ranks that share layers or sequences (tensor and context parallelism) wait for each other inside a layer. They
go on as above where memory ran out on all of them between the same collectives, as on equal devices with
equal shares. Where it ran out on one alone, what the others wait for cannot be taken back: that rank ends,
and the launcher with it the run.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from glm_rlhf.parallel.megatron_compat.stores import num_collectives, world_store
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import ContextShard
from glm_rlhf.parallel.pipeline.multi_model import ScheduledMicroBatch
from glm_rlhf.parallel.runtime.topology import Topology

_PEERS_S = 5.0
"""How long a rank waits for its tensor- and context-parallel peers to say that they have no memory either."""
_NONE = 2**62
_num_asked: Counter[str] = Counter()


class OutOfMemory(Exception):
    """Raised on every rank of a schedule, after its end, when memory ran out on some."""

    def __init__(self, num_tokens: int, index: int | None) -> None:
        super().__init__(f"out of memory in a micro-batch of {num_tokens} tokens")
        self.num_tokens = num_tokens
        """Of the micro-batch that failed, the smallest of several ranks'; the same on all ranks."""
        self.index = index
        """Which one failed on this rank; None where none did."""


class OomGuard:
    """Owns what this rank knows about its memory in one schedule."""

    def __init__(self, turns: Sequence[ScheduledMicroBatch], topology: Topology, *, is_final: bool) -> None:
        """Begin.

        Args:
            turns: what goes through the schedule.
            topology: layout and groups.
            is_final: whether weights change, or reductions begin, before the schedule's end: it cannot be
                run again then.
        """
        self._turns = turns
        self._num_tokens = [turn.share.packed.num_tokens for turn in turns]
        self._place, self._is_final = topology, is_final
        self._newest = 0
        self._failed: int | None = None

    @property
    def has_failed(self) -> bool:
        """Whether memory has run out, and only messages are sent any more."""
        return self._failed is not None

    @contextlib.contextmanager
    def guard(self, index: int | None = None) -> Iterator[None]:
        """Run a block of the schedule; where memory runs out in it the schedule is over.

        Args:
            index: the turn that the block begins with; None for the newest.

        Raises:
            ValueError: memory has run out where the other ranks cannot come to the schedule's end.
        """
        self._newest = self._newest if index is None else index
        try:
            yield
        except torch.OutOfMemoryError as error:
            failed = self._newest
            if self._place.layout.pp > 1:  # several are alive at once: the largest has to become smaller
                failed = max(range(len(self._num_tokens)), key=self._num_tokens.__getitem__)
            what = f"out of memory on rank {self._place.rank} in a micro-batch of {self._num_tokens[failed]}"
            if self._is_final:
                raise ValueError(
                    f"{what} tokens, and the step cannot begin again, since weights change or gradients are "
                    "reduced during backward: lower train.micro_batch_tokens, or set optimizer.in_backward "
                    f"and train.overlap_communication to false ({error})"
                ) from error
            if not has_failed_on_peers(self._place.rank, (self._place.tp_group, self._place.cp_group)):
                raise ValueError(
                    f"{what} tokens, but not on the ranks that share its layers and now wait for it: lower "
                    f"train.micro_batch_tokens; the same command goes on from the last checkpoint ({error})"
                ) from error
            self._failed = failed

    def agree(self, *, forward_only: bool) -> None:
        """End the schedule on all ranks alike; every rank of it calls this.

        Communicates 8 bytes in the world, or with `forward_only` in each group of this copy of the model.

        Raises:
            OutOfMemory: memory ran out on some rank.
        """
        num_tokens = _NONE if self._failed is None else self._num_tokens[self._failed]
        groups = groups_of(self._place, forward_only=forward_only)
        if groups:
            smallest = torch.tensor([num_tokens], device=self._place.device)
            for group in groups:
                dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
            num_tokens = int(smallest)
        if num_tokens == _NONE:
            return
        if self._place.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(num_tokens, None if self._failed is None else self._turns[self._failed].index)


def groups_of(topology: Topology, *, forward_only: bool) -> list[dist.ProcessGroup]:
    """Return the groups in which, one after the other, the ranks of a schedule come to agree."""
    if not forward_only:
        return [dist.group.WORLD]
    return [group for group in (topology.tp_group, topology.cp_group, topology.pp_group) if group.size() > 1]


def zero_output(model: GLMModel, token_share: ContextShard) -> torch.Tensor:
    """Return zeros in place of what a chunk would give for a micro-batch, with no graph behind them."""
    config, layout = model.config, model.topology.layout
    num_rows = token_share.positions_T.shape[0]
    if model.post_process:
        shape = (num_rows, config.hidden_size)
    else:
        shape = (num_rows // (layout.tp if config.sequence_parallel else 1), 1, config.hidden_size)
    return torch.zeros(shape, dtype=config.params_dtype, device=model.topology.device)


def backward_or_zeros(attempt: OomGuard, backward_step: Callable[..., Any], *given: Any) -> Any:
    """Return what Megatron-core's backward step does: gradients of its inputs, zeros once it is over."""
    if not attempt.has_failed:
        with attempt.guard():
            return backward_step(*given)
    inputs = given[0]
    if isinstance(inputs, list):
        return [None if one is None else torch.zeros_like(one) for one in inputs]
    return None if inputs is None else torch.zeros_like(inputs)


def has_failed_on_peers(rank: int, groups: Sequence[dist.ProcessGroup]) -> bool:
    """Return whether memory ran out on all ranks of the groups, at the same collective of each.

    Called where it has run out on this one; waits some seconds for the others.

    Args:
        rank: of this process, in the world.
        groups: those in which ranks wait for each other inside a layer.
    """
    store = dist.PrefixStore("out_of_memory", world_store())
    awaited = []
    for group in groups:
        name = group.group_name
        _num_asked[name] += 1
        at = f"{name}/{_num_asked[name]}/{num_collectives(group)}"
        store.set(f"{at}/{rank}", "")
        awaited += [f"{at}/{peer}" for peer in dist.get_process_group_ranks(group)]
    try:
        store.wait(awaited, timedelta(seconds=_PEERS_S))
    except RuntimeError:  # DistStoreError, a FileStore's own, or a store that is gone
        return False
    return True
