"""A line at the start of a run whose save is expected to take longer than torchrun waits after a signal."""

import os
from collections.abc import Mapping

from glm_rlhf.engine.cost.save_time import ASSUMED_DISK_BYTES_PER_S, checkpoint_bytes, save_s
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.launch import is_under_torchrun
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.weight_map import SCALAR_ROLES

SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds after which torchrun kills the ranks to which it has passed a signal, if its torch reads it."""
DEFAULT_SHUTDOWN_S = 30.0


def log_long_save(states: Mapping[str, AnyTrainingState], topology: Topology) -> None:
    """Log whether a save will outlast torchrun's patience; every rank may call this, nothing communicates.

    Args:
        states: what a checkpoint holds, by name.
        topology: whose main rank writes.
    """
    if not is_under_torchrun() or not topology.is_main_rank:
        return
    chunks = [state.bare_chunks[0] for state in states.values()]
    num_bytes = checkpoint_bytes(
        ((chunk.glm, chunk.role in SCALAR_ROLES) for chunk in chunks),
        itemsize=chunks[0].config.params_dtype.itemsize,
    )
    expected_s, limit_s = save_s(num_bytes), shutdown_s()
    if expected_s > limit_s:
        log(
            f"a checkpoint has about {num_bytes / 1e9:.1f} GB and is expected to take {expected_s:.0f} s, at "
            f"{ASSUMED_DISK_BYTES_PER_S / 1e9:g} GB/s: longer than the {limit_s:g} s after which torchrun "
            f"kills the ranks to which it has passed a signal. Start torchrun with {SHUTDOWN_VARIABLE}="
            f"{_rounded(2 * expected_s)}, or send SIGUSR1 to one rank instead of a signal to torchrun",
            topology,
        )


def shutdown_s() -> float:
    """Return the seconds after which the torchrun of this rank kills it, from the environment they share."""
    value = os.environ.get(SHUTDOWN_VARIABLE)
    if value is None:
        return DEFAULT_SHUTDOWN_S
    from torch.distributed.launcher.api import LaunchConfig

    is_read = "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    return float(value) if is_read else DEFAULT_SHUTDOWN_S


def _rounded(seconds: float) -> int:
    return -(-int(seconds) // 30) * 30
