"""A policy's parameters in the generation layout, refreshed in memory from those in training."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from glm_rlhf.parallel.inference.weight_views import ChunkWeights, weights_by_name
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.reshard_plan import Transfer, layers_of_stage, plan_reshard

DEFAULT_BUFFER_BYTES = 256 * 2**20


class ReshardedWeights:
    """Owns this rank's parameters in the generation layout, except for those that are equal in both layouts.

    The plan is made once; each `filled` transfers the current weights, layer by layer, and frees their memory
    at its end. The tensors stay the same objects.
    """

    def __init__(
        self,
        chunks: Sequence[GLMModel],
        target: Topology,
        *,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    ) -> None:
        """Plan the transfers; every rank of the world calls this.

        Args:
            chunks: this rank's chunks of a policy, in the training layout.
            target: topology of the generation layout, `generation_topology`.
            buffer_bytes: memory for the send and receive buffers.

        Raises:
            ValueError: the layout cannot split this model, or a row of some weight does not fit the buffer.
        """
        glm, source = chunks[0].glm, chunks[0].topology
        self._source = {name: weight for chunk in chunks for name, weight in chunk.named_weights()}
        like = next(iter(self._source.values()))
        self._buffer_elements = buffer_bytes // (2 * like.element_size())
        plan = plan_reshard(
            glm,
            source.layout,
            target.layout,
            world_size=target.world_size,
            buffer_elements=self._buffer_elements,
        )
        rank = target.rank
        self._copies = [move for move in plan.copies if move.target_rank == rank]
        self._rounds = [
            _Round([m for m in moves if m.source_rank == rank], [m for m in moves if m.target_rank == rank])
            for moves in plan.rounds
        ]
        self._world_size = target.world_size
        self._owned = {
            name: _without_memory(like, shape)
            for name, shape in plan.shapes[rank].items()
            if name not in plan.kept[rank]
        }
        self._tensors = {name: self._owned.get(name, self._source.get(name)) for name in plan.shapes[rank]}
        self.topology = target
        """Topology of the generation layout."""
        self.chunks: list[ChunkWeights] = [
            weights_by_name(self._tensors, glm, target, layers=layers)
            for layers in layers_of_stage(glm, target.layout, target.pp_rank)
        ]
        """The parameters for generation; valid only inside `filled`."""
        self.num_bytes_sent = like.element_size() * sum(each.num_sent for each in self._rounds)
        """Bytes that this rank sends per `filled`."""

    @contextlib.contextmanager
    def filled(self) -> Iterator[list[ChunkWeights]]:
        """Return, as a context manager, the current parameters; every rank of the world enters.

        The world communicates: one all-to-all per round, of at most half the buffer per rank.
        """
        try:
            for tensor in self._owned.values():
                tensor.untyped_storage().resize_(tensor.nbytes)
            self._fill()
            yield self.chunks
        finally:
            self._release()

    def _release(self) -> None:
        for tensor in self._owned.values():
            tensor.untyped_storage().resize_(0)

    @torch.no_grad()
    def _fill(self) -> None:
        for move in self._copies:
            _target_of(move, self._tensors).copy_(_source_of(move, self._source))
        if not self._rounds:
            return
        like = next(iter(self._source.values()))
        size = max((max(each.num_sent, each.num_received) for each in self._rounds), default=0)
        sending, receiving = like.new_empty(2, size).unbind(0)
        for each in self._rounds:
            for move, part in zip(each.sends, _parts(sending, each.sends), strict=True):
                held = _source_of(move, self._source)
                part.view(held.shape).copy_(held)
            dist.all_to_all_single(
                receiving[: each.num_received],
                sending[: each.num_sent],
                each.received_from(self._world_size),
                each.sent_to(self._world_size),
            )
            for move, part in zip(each.receives, _parts(receiving, each.receives), strict=True):
                wanted = _target_of(move, self._tensors)
                wanted.copy_(part.view(wanted.shape))


class _Round:
    """The transfers from and to this rank in one round, sorted by the other rank."""

    def __init__(self, sends: Iterable[Transfer], receives: Iterable[Transfer]) -> None:
        # Sorting is stable: both ranks of a pair keep the plan's order.
        self.sends = sorted(sends, key=lambda move: move.target_rank)
        self.receives = sorted(receives, key=lambda move: move.source_rank)
        self.num_sent = sum(move.num_elements for move in self.sends)
        self.num_received = sum(move.num_elements for move in self.receives)

    def sent_to(self, world_size: int) -> list[int]:
        """Return the number of elements sent to each rank."""
        return _totals(((move.target_rank, move.num_elements) for move in self.sends), world_size)

    def received_from(self, world_size: int) -> list[int]:
        """Return the number of elements received from each rank."""
        return _totals(((move.source_rank, move.num_elements) for move in self.receives), world_size)


def _without_memory(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = like.new_empty(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def _totals(pairs: Iterable[tuple[int, int]], world_size: int) -> list[int]:
    totals: dict[int, int] = defaultdict(int)
    for rank, num_elements in pairs:
        totals[rank] += num_elements
    return [totals[rank] for rank in range(world_size)]


def _parts(buffer: torch.Tensor, moves: Sequence[Transfer]) -> tuple[torch.Tensor, ...]:
    sizes = [move.num_elements for move in moves]
    return buffer[: sum(sizes)].split(sizes) if sizes else ()


def _source_of(move: Transfer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[move.source_name].narrow(move.dim, move.source_start, move.length)


def _target_of(move: Transfer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[move.target_name].narrow(move.dim, move.target_start, move.length)
