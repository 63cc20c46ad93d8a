"""Which rank sends which rows of which weight to whom when a policy changes its layout.

Both layouts say which pieces of the source's tensors each rank holds (`sharding.shards_of`); where a wanted
piece and a held one overlap, rows or columns move. The plan follows from the two layouts alone: every rank
works it out for itself, once.
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
"""A large weight moves in parts of a quarter of the buffer, so that a rank can serve several at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Rows (dim 0) or columns (dim 1) of one rank's parameter that become part of another's."""

    source_rank: int
    target_rank: int
    source_name: str
    """Our name of the parameter on the source rank."""
    target_name: str
    """Our name of the parameter on the target rank."""
    dim: int
    """The dimension that is cut."""
    source_start: int
    """First row or column of the source's parameter."""
    target_start: int
    """First row or column of the target's parameter."""
    length: int
    """Rows or columns."""
    num_elements: int
    """Numbers that move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """All that happens on all ranks."""

    shapes: tuple[dict[str, tuple[int, ...]], ...]
    """Of each rank: our names and shapes of its parameters in the new layout, in the model's order."""
    kept: tuple[frozenset[str], ...]
    """Of each rank: names of parameters that are the same in both layouts."""
    copies: tuple[Transfer, ...]
    """Moves within a rank."""
    rounds: tuple[tuple[Transfer, ...], ...]
    """Moves between ranks, layer by layer; in a round no rank sends or receives more than a buffer holds."""


def plan_reshard(
    config: GLMConfig, source: Layout, target: Layout, *, world_size: int, buffer_elements: int
) -> ReshardPlan:
    """Return the moves that turn a policy's parameters in one layout into those of another.

    A rank takes what it has from itself, the rest from one of the ranks that hold it, different targets
    from different ones.

    Args:
        config: the whole model.
        source: the layout that holds the parameters.
        target: the layout that wants them.
        world_size: ranks, the same in both layouts.
        buffer_elements: the most numbers that a rank sends in a round, and the most that it receives.

    Raises:
        ValueError: a layout fits neither the model nor the world, or a single row is larger than the buffer.
    """
    held = [_shards_on(rank, config, source, world_size) for rank in range(world_size)]
    wanted = [_shards_on(rank, config, target, world_size) for rank in range(world_size)]
    holders = _holders(held)
    kept = [
        frozenset(name for name, shard in wanted[rank].items() if held[rank].get(name) == shard)
        for rank in range(world_size)
    ]
    copies: list[Transfer] = []
    by_rank: list[list[list[Transfer]]] = []  # of each rank, of each of its parameters
    for rank in range(world_size):
        changed = [shard for name, shard in wanted[rank].items() if name not in kept[rank]]
        moves = [list(_moves_to(rank, shard, holders)) for shard in changed]
        copies += [move for of_one in moves for move in of_one if move.source_rank == rank]
        by_rank.append([[move for move in of_one if move.source_rank != rank] for of_one in moves])
    return ReshardPlan(
        shapes=tuple({name: shard.shape for name, shard in shards.items()} for shards in wanted),
        kept=tuple(kept),
        copies=tuple(copies),
        rounds=tuple(_rounds(_in_turns(by_rank, buffer_elements), buffer_elements)),
    )


def layers_of_stage(config: GLMConfig, layout: Layout, stage: int) -> list[range]:
    """Return the layers of each chunk of a pipeline stage; with several chunks the stages interleave."""
    size = config.num_layers // (layout.pp * layout.vpp)
    firsts = [(chunk * layout.pp + stage) * size for chunk in range(layout.vpp)]
    return [range(first, first + size) for first in firsts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holding:
    """A piece of one of their tensors, and where it stands."""

    ranks: tuple[int, ...]
    start: int
    stop: int
    name: str
    offset: int


def _shards_on(rank: int, config: GLMConfig, layout: Layout, world_size: int) -> dict[str, ParamShard]:
    """Return a rank's parameters by our name, in the model's order."""
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
    """Return by their names who holds which pieces; ranks that hold the same one together."""
    ranks: dict[tuple[str, int, int, str, int], list[int]] = defaultdict(list)
    for rank, shards in enumerate(held):
        for shard in shards.values():
            offset = 0
            for piece in shard.pieces:
                ranks[piece.name, piece.start, piece.stop, shard.name, offset].append(rank)
                offset += piece.length
    holders = defaultdict(list)
    for (name, start, stop, ours, offset), of_piece in ranks.items():
        holders[name].append(
            _Holding(ranks=tuple(of_piece), start=start, stop=stop, name=ours, offset=offset)
        )
    return holders


def _moves_to(rank: int, shard: ParamShard, holders: dict[str, list[_Holding]]) -> Iterator[Transfer]:
    """Yield what makes up one parameter of a rank."""
    dim = shard.pieces[0].dim
    elements_per_index = prod(shard.shape) // shard.shape[dim]
    target_start = 0
    for piece in shard.pieces:
        position = piece.start
        while position < piece.stop:
            at_hand = [held for held in holders[piece.name] if held.start <= position < held.stop]
            own = [held for held in at_hand if rank in held.ranks]
            chosen = own[0] if own else at_hand[rank % len(at_hand)]
            length = min(piece.stop, chosen.stop) - position
            yield Transfer(
                source_rank=rank if own else chosen.ranks[rank % len(chosen.ranks)],
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
    """Yield a move in parts that are small beside the buffer, or single rows."""
    elements_per_index = move.num_elements // move.length
    if elements_per_index > buffer_elements:
        raise ValueError(
            f"the buffer holds {buffer_elements} numbers, one row or column of {move.target_name} has "
            f"{elements_per_index}: give it more"
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


def _in_turns(by_rank: list[list[list[Transfer]]], buffer_elements: int) -> Iterator[Transfer]:
    """Yield moves in parts: every rank's first parameter, every rank's second one, and so on.

    Within these the ranks take turns, so that all stages move at once and none waits for another's share.
    """
    for of_all_ranks in zip_longest(*by_rank, fillvalue=()):
        parts = [[part for move in moves for part in _split(move, buffer_elements)] for moves in of_all_ranks]
        for turn in zip_longest(*parts):
            yield from (part for part in turn if part is not None)


def _rounds(moves: Iterable[Transfer], buffer_elements: int) -> Iterator[tuple[Transfer, ...]]:
    """Yield the moves in order, as many at once as fit every rank's buffers."""
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
