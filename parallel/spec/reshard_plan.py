"""The transfers that move a policy's weights from one layout to another.

`sharding.shards_of` gives the pieces of each Hugging Face tensor that a rank holds in a layout. Where a
target piece and a source piece overlap, rows or columns move. The plan depends on the two layouts alone:
every rank computes all of it once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.sharding import ParamShard, shards_of
from glm_rlhf.parallel.spec.weight_map import weights_of

_CHUNKS_IN_BUFFER = 4
"""A large weight moves in parts of a quarter of the buffer, so that a rank can send several in a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Rows (dim 0) or columns (dim 1) of one rank's parameter that become part of another rank's."""

    source_rank: int
    target_rank: int
    source_name: str
    """Megatron-core name of the parameter on the source rank."""
    target_name: str
    """Megatron-core name of the parameter on the target rank."""
    dim: int
    """The dimension that is cut."""
    source_start: int
    """First row or column of the source's parameter."""
    target_start: int
    """First row or column of the target's parameter."""
    length: int
    """Rows or columns."""
    num_elements: int
    """Elements that move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """The transfers of all ranks."""

    shapes: tuple[dict[str, tuple[int, ...]], ...]
    """Per rank: names and shapes of its parameters in the target layout, in the model's order."""
    kept: tuple[frozenset[str], ...]
    """Per rank: names of parameters that are equal in both layouts."""
    copies: tuple[Transfer, ...]
    """Transfers within a rank."""
    rounds: tuple[tuple[Transfer, ...], ...]
    """Transfers between ranks, layer by layer; per round no rank sends or receives more than a buffer."""


def plan_reshard(
    config: GLMConfig, source: Layout, target: Layout, *, world_size: int, buffer_elements: int
) -> ReshardPlan:
    """Return the transfers from a policy's parameters in one layout to those in another.

    A rank copies what it holds itself. Of several source ranks that hold the same piece, target ranks use
    different ones.

    Args:
        config: the whole model.
        source: layout of the parameters.
        target: layout to produce.
        world_size: ranks, the same in both layouts.
        buffer_elements: most elements that a rank sends, and most that it receives, per round.

    Raises:
        ValueError: a layout does not fit the model or the world, or a single row is larger than the buffer.
    """
    held = [_shards_on(rank, config, source, world_size) for rank in range(world_size)]
    wanted = [_shards_on(rank, config, target, world_size) for rank in range(world_size)]
    holders = _holders(held)
    kept = [
        frozenset(name for name, shard in wanted[rank].items() if held[rank].get(name) == shard)
        for rank in range(world_size)
    ]
    copies: list[Transfer] = []
    by_rank: list[list[list[Transfer]]] = []  # per rank and parameter
    for rank in range(world_size):
        changed = [shard for name, shard in wanted[rank].items() if name not in kept[rank]]
        moves = [list(_moves_to(rank, shard, holders)) for shard in changed]
        copies += [move for param_moves in moves for move in param_moves if move.source_rank == rank]
        by_rank.append([[move for move in param_moves if move.source_rank != rank] for param_moves in moves])
    return ReshardPlan(
        shapes=tuple({name: shard.shape for name, shard in shards.items()} for shards in wanted),
        kept=tuple(kept),
        copies=tuple(copies),
        rounds=tuple(_rounds(_interleaved(by_rank, buffer_elements), buffer_elements)),
    )


def layers_of_stage(config: GLMConfig, layout: Layout, stage: int) -> list[range]:
    """Return the layers of each chunk of a pipeline stage; with several chunks the stages interleave."""
    size = config.num_layers // (layout.pp * layout.vpp)
    firsts = [(chunk * layout.pp + stage) * size for chunk in range(layout.vpp)]
    return [range(first, first + size) for first in firsts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holding:
    """A piece of a Hugging Face tensor, the ranks that hold it, and its offset in their parameter."""

    ranks: tuple[int, ...]
    start: int
    stop: int
    name: str
    offset: int


def _shards_on(rank: int, config: GLMConfig, layout: Layout, world_size: int) -> dict[str, ParamShard]:
    """Return a rank's parameters by name, in the model's order."""
    layout.check_model(config)
    layout.dp(world_size)
    stage = rank // (world_size // layout.pp)
    chunks = layers_of_stage(config, layout, stage)
    weights = weights_of(
        config,
        layers=[layer for chunk in chunks for layer in chunk],
        has_embedding=stage == 0,
        has_head=stage == layout.pp - 1,
    )
    return {
        shard.name: shard
        for weight in weights
        for shard in shards_of(weight, config, tp_rank=rank % layout.tp, tp_size=layout.tp)
    }


def _holders(held: list[dict[str, ParamShard]]) -> dict[str, list[_Holding]]:
    """Return the holders of each Hugging Face tensor; ranks that hold the same piece share an entry."""
    ranks: dict[tuple[str, int, int, str, int], list[int]] = defaultdict(list)
    for rank, shards in enumerate(held):
        for shard in shards.values():
            offset = 0
            for piece in shard.pieces:
                ranks[piece.name, piece.start, piece.stop, shard.name, offset].append(rank)
                offset += piece.length
    holders = defaultdict(list)
    for (hf_name, start, stop, name, offset), piece_ranks in ranks.items():
        holders[hf_name].append(
            _Holding(ranks=tuple(piece_ranks), start=start, stop=stop, name=name, offset=offset)
        )
    return holders


def _moves_to(rank: int, shard: ParamShard, holders: dict[str, list[_Holding]]) -> Iterator[Transfer]:
    """Yield the transfers that fill one parameter of a rank."""
    dim = shard.pieces[0].dim
    elements_per_index = prod(shard.shape) // shard.shape[dim]
    target_start = 0
    for piece in shard.pieces:
        position = piece.start
        while position < piece.stop:
            available = [held for held in holders[piece.name] if held.start <= position < held.stop]
            local = [held for held in available if rank in held.ranks]
            chosen = local[0] if local else available[rank % len(available)]
            length = min(piece.stop, chosen.stop) - position
            yield Transfer(
                source_rank=rank if local else chosen.ranks[rank % len(chosen.ranks)],
                target_rank=rank,
                source_name=chosen.name,
                target_name=shard.name,
                dim=dim,
                source_start=chosen.offset + position - chosen.start,
                target_start=target_start,
                length=length,
                num_elements=length * elements_per_index,
            )
            position += length
            target_start += length


def _split(move: Transfer, buffer_elements: int) -> Iterator[Transfer]:
    """Yield a transfer in parts of at most a quarter of the buffer, or in single rows."""
    elements_per_index = move.num_elements // move.length
    if elements_per_index > buffer_elements:
        raise ValueError(
            f"the buffer holds {buffer_elements} elements, one row or column of {move.target_name} has "
            f"{elements_per_index}: give a larger buffer"
        )
    step = max(1, buffer_elements // _CHUNKS_IN_BUFFER // elements_per_index)
    for start in range(0, move.length, step):
        length = min(step, move.length - start)
        yield replace(
            move,
            source_start=move.source_start + start,
            target_start=move.target_start + start,
            length=length,
            num_elements=length * elements_per_index,
        )


def _interleaved(by_rank: list[list[list[Transfer]]], buffer_elements: int) -> Iterator[Transfer]:
    """Yield transfers in parts: every rank's first parameter, then every rank's second, and so on.

    Within one parameter the ranks alternate, so that all stages transfer at the same time.
    """
    for rank_moves in zip_longest(*by_rank, fillvalue=()):
        parts = [[part for move in moves for part in _split(move, buffer_elements)] for moves in rank_moves]
        for parts_per_rank in zip_longest(*parts):
            yield from (part for part in parts_per_rank if part is not None)


def _rounds(moves: Iterable[Transfer], buffer_elements: int) -> Iterator[tuple[Transfer, ...]]:
    """Yield the transfers in order, grouped into rounds that fit every rank's buffers."""
    current: list[Transfer] = []
    sent: dict[int, int] = defaultdict(int)
    received: dict[int, int] = defaultdict(int)
    for move in moves:
        is_full = (
            max(sent[move.source_rank], received[move.target_rank]) + move.num_elements > buffer_elements
        )
        if is_full:
            yield tuple(current)
            current = []
            sent.clear()
            received.clear()
        current.append(move)
        sent[move.source_rank] += move.num_elements
        received[move.target_rank] += move.num_elements
    if current:
        yield tuple(current)
