"""The number of elements of a model on one rank, from the table that import and export use.

No model is built and nothing communicates, so that a layout can be evaluated before a launch.
"""

import functools
import math
from dataclasses import dataclass

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.sharding import shards_of
from glm_rlhf.parallel.spec.weight_map import Role, Weight, weights_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSizes:
    """Elements of each parameter of one model chunk on one rank, equal on all tensor-parallel ranks."""

    model_dtype: tuple[int, ...]
    """Parameters in the model's dtype."""
    fp32: tuple[int, ...]
    """Parameters of a scalar head, always fp32."""

    @property
    def num_model_dtype(self) -> int:
        """Elements in the model's dtype."""
        return sum(self.model_dtype)

    @property
    def num_fp32(self) -> int:
        """Elements in fp32."""
        return sum(self.fp32)


def chunk_sizes(
    config: GLMConfig, layout: Layout, *, has_scalar_head: bool, stage: int, chunk: int
) -> ChunkSizes:
    """Return the sizes of what `build_model` allocates for chunk `chunk` of pipeline stage `stage`.

    Args:
        config: the whole model.
        layout: how it is split.
        has_scalar_head: whether it is a critic or reward model.
        stage: 0 ≤ stage < pp.
        chunk: 0 ≤ chunk < vpp.

    Raises:
        ValueError: the model cannot be split this way.
    """
    layout.check_model(config)
    return _sizes(
        config,
        layout.tp,
        config.num_layers // (layout.pp * layout.vpp),
        has_scalar_head,
        stage == 0 and chunk == 0,
        stage == layout.pp - 1 and chunk == layout.vpp - 1,
    )


@functools.lru_cache(maxsize=4096)
def _sizes(
    config: GLMConfig, tp: int, num_layers: int, has_scalar_head: bool, is_first: bool, is_last: bool
) -> ChunkSizes:
    role: Role = "critic" if has_scalar_head else "policy"
    rows = weights_of(config, layers=[0], has_embedding=is_first, has_head=is_last, role=role)
    model_dtype: list[int] = []
    fp32: list[int] = []
    for row in rows:
        sizes = _shard_sizes(row, config, tp)
        if row.section == "value_head":
            fp32 += sizes
        else:
            model_dtype += sizes * (num_layers if row.section == "layer" else 1)
    return ChunkSizes(model_dtype=tuple(model_dtype), fp32=tuple(fp32))


def _shard_sizes(row: Weight, config: GLMConfig, tp: int) -> list[int]:
    return [math.prod(shard.shape) for shard in shards_of(row, config, tp_rank=0, tp_size=tp)]


def num_parameters(config: GLMConfig, *, has_scalar_head: bool = False) -> int:
    """Return the number of parameters of the whole model."""
    whole = _sizes(config, 1, config.num_layers, has_scalar_head, True, True)
    return whole.num_model_dtype + whole.num_fp32
