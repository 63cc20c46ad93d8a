"""Which rows or columns of a Hugging Face tensor make up a tensor-parallel shard.

`shards_of` returns them as a list of pieces. Import (`read_shard`) and export (`place_shard`) use the same
list, so they cannot disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.weight_map import Weight, names_within, sizes


@dataclass(frozen=True, slots=True)
class HfSlice:
    """Rows (dim 0) or columns (dim 1) [start, stop) of a Hugging Face tensor."""

    name: str
    """Name of the tensor."""
    dim: int
    """The dimension that is sliced."""
    start: int
    """First index of the slice."""
    stop: int
    """One past the last index."""

    @property
    def length(self) -> int:
        """Number of rows or columns."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamShard:
    """One rank's parameter: its pieces concatenated in order."""

    name: str
    """Megatron-core name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the parameter on this rank."""
    pieces: tuple[HfSlice, ...]
    """Sources of its rows, or of its columns."""


def shards_of(weight: Weight, config: GLMConfig, *, tp_rank: int, tp_size: int) -> list[ParamShard]:
    """Return the parameters that hold a rank's part of a weight.

    One parameter, except for query, key and value with more ranks than KV heads: then `linear_q` holds
    this rank's queries, and `linear_kv` the key head and the value head that they use, replicated on tp / K
    ranks.

    Args:
        weight: a row of the table with its layer index filled in.
        config: the whole model.
        tp_rank: 0 ≤ rank < tp_size.
        tp_size: ranks that split the weight.

    Raises:
        ValueError: the model cannot be split over so many ranks; the message names both numbers.
    """
    Layout(tp=tp_size).check_model(config)
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank is {tp_rank}; with tp {tp_size} it must be 0 to {tp_size - 1}")
    hf_shapes = names_within(weight, config)
    if weight.split == "qkv":
        return _qkv_shards(weight, config, tp_rank, tp_size)
    (name, shape), *_ = hf_shapes.items()
    if weight.split == "replicated":
        pieces = [HfSlice(name, 0, 0, shape[0])]
    elif weight.split == "rows":
        pieces = [_nth_part(name, 0, 0, shape[0], tp_rank, tp_size)]
    elif weight.split == "columns":
        pieces = [_nth_part(name, 1, 0, shape[1], tp_rank, tp_size)]
    else:
        half = shape[0] // 2
        pieces = [_nth_part(name, 0, base, half, tp_rank, tp_size) for base in (0, half)]
    return [_shard(weight.name, pieces, shape)]


def owner_rank(weight: Weight, shard: ParamShard, config: GLMConfig, *, tp_rank: int, tp_size: int) -> int:
    """Return the lowest tensor-parallel rank that holds the same pieces as rank `tp_rank` in `shard`."""
    for rank in range(tp_rank):
        if shard in shards_of(weight, config, tp_rank=rank, tp_size=tp_size):
            return rank
    return tp_rank


def _qkv_shards(weight: Weight, config: GLMConfig, tp_rank: int, tp_size: int) -> list[ParamShard]:
    head, group = config.head_size, config.heads_per_group * config.head_size
    if config.has_interleaved_qkv:  # the file's own order is that of Megatron-core, head by head
        (name, shape), *_ = names_within(weight, config).items()
        rows = _nth_part(name, 0, 0, shape[0], tp_rank, tp_size)
        return [_shard(weight.name, [rows], shape)]
    (query, query_base), (key, key_base), (value, value_base) = _sections(weight, config)
    columns = names_within(weight, config)[query][1:]

    def group_head(name: str, base: int, index: int) -> HfSlice:
        return HfSlice(name, 0, base + index * head, base + (index + 1) * head)

    if tp_size <= config.num_kv_heads:
        num_groups = config.num_kv_heads // tp_size
        pieces = []
        for index in range(tp_rank * num_groups, (tp_rank + 1) * num_groups):
            pieces.append(HfSlice(query, 0, query_base + index * group, query_base + (index + 1) * group))
            pieces += [group_head(key, key_base, index), group_head(value, value_base, index)]
        return [_shard(weight.name, pieces, (0, *columns))]
    index = tp_rank * config.num_kv_heads // tp_size
    queries = [_nth_part(query, 0, query_base, config.num_heads * head, tp_rank, tp_size)]
    key_value = [group_head(key, key_base, index), group_head(value, value_base, index)]
    return [
        _shard(weight.name.replace("linear_qkv", "linear_q"), queries, (0, *columns)),
        _shard(weight.name.replace("linear_qkv", "linear_kv"), key_value, (0, *columns)),
    ]


def _sections(weight: Weight, config: GLMConfig) -> list[tuple[str, int]]:
    """Return name and first row of query, key and value: three tensors, or three parts of one."""
    if len(weight.hf_names) == 3:
        return [(name, 0) for name in weight.hf_names]
    size, (name,) = sizes(config), weight.hf_names
    return [(name, 0), (name, size["Q"]), (name, size["Q"] + size["KV"])]


def _nth_part(name: str, dim: int, base: int, length: int, rank: int, num_ranks: int) -> HfSlice:
    part = length // num_ranks
    return HfSlice(name, dim, base + rank * part, base + (rank + 1) * part)


def _shard(name: str, pieces: list[HfSlice], whole_shape: tuple[int, ...]) -> ParamShard:
    shape = list(whole_shape)
    shape[pieces[0].dim] = sum(piece.length for piece in pieces)
    return ParamShard(name=name, shape=tuple(shape), pieces=tuple(pieces))


def read_shard(
    shard: ParamShard, read: Callable[[HfSlice, torch.Tensor], None], *, dtype: torch.dtype
) -> torch.Tensor:
    """Return a rank's parameter, a new CPU tensor of `shard.shape`.

    Args:
        shard: the parameter and its pieces.
        read: reads one piece into a tensor.
        dtype: of the result.
    """
    out = torch.empty(shard.shape, dtype=dtype)
    read_shard_into(shard, read, out)
    return out


def read_shard_into(
    shard: ParamShard, read: Callable[[HfSlice, torch.Tensor], None], out: torch.Tensor
) -> None:
    """Fill `out`, a rank's parameter or another tensor of its shape.

    Raises:
        ValueError: `out` does not have the shape of the shard.
    """
    for piece, part in place_shard(shard, out):
        read(piece, part)


def place_shard(shard: ParamShard, tensor: torch.Tensor) -> list[tuple[HfSlice, torch.Tensor]]:
    """Return each piece of a rank's parameter with the view of the parameter that holds it.

    Raises:
        ValueError: `tensor` does not have the shape of the shard.
    """
    if tuple(tensor.shape) != shard.shape:
        raise ValueError(f"{shard.name} has the shape {list(tensor.shape)}, required is {list(shard.shape)}")
    return list(zip(shard.pieces, _parts(shard, tensor), strict=True))


def _parts(shard: ParamShard, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    lengths = [piece.length for piece in shard.pieces]
    parts: tuple[torch.Tensor, ...] = tensor.split(lengths, dim=shard.pieces[0].dim)
    return parts
