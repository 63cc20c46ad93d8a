"""Expected size of a checkpoint, and time to write it."""

from collections.abc import Iterable

from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.shard_sizes import num_parameters

ASSUMED_DISK_BYTES_PER_S = 10**9
"""Rate of a disk that all ranks write to together, where none is measured."""
_FP32 = 4


def checkpoint_bytes(models: Iterable[tuple[GLMConfig, bool]], *, itemsize: int) -> int:
    """Return the bytes of a checkpoint over all ranks: weights, the optimizer's fp32 weights, two moments.

    Args:
        models: shape of each trained model, and whether it has a scalar head.
        itemsize: bytes of a weight: 2 for bf16; 4 for fp32, where the weights are the optimizer's.
    """
    per_parameter = 2 * _FP32 + itemsize + (_FP32 if itemsize != _FP32 else 0)
    return sum(per_parameter * num_parameters(shape, has_scalar_head=has) for shape, has in models)


def save_s(num_bytes: int, bytes_per_s: float = ASSUMED_DISK_BYTES_PER_S) -> float:
    """Return the seconds that it takes to write a checkpoint."""
    return num_bytes / bytes_per_s
