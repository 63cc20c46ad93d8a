"""A layout for generation on the same ranks, next to the training layout that Megatron-core knows.

Training modules take their groups from Megatron-core's global state, which holds one layout. Generation reads
parameter tensors and takes its groups as arguments, so its layout may differ.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator

from glm_rlhf.parallel.runtime.topology import DEFAULT_TIMEOUT_S, NUM_CHANNELS, Topology
from glm_rlhf.parallel.spec.layout import Layout

_ORDER = "tp-cp-ep-dp-pp"
"""Megatron-core's order: neighbouring ranks share layers, pipeline stages are far apart."""


@contextlib.contextmanager
def generation_topology(
    layout: Layout, training: Topology, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[Topology]:
    """Return, as a context manager, this rank's topology for generation; every rank must enter.

    Ranks are ordered as Megatron-core orders them: equal axes give groups of equal ranks. Megatron-core's
    global state does not change.

    Args:
        layout: tensor and pipeline parallelism; the rest of the world are copies of the model.
        training: the training topology, which is active.
        timeout_s: seconds after which a collective that some rank never entered fails.

    Raises:
        ValueError: the layout does not divide the world, or has an axis that only training supports.
    """
    if layout != Layout(tp=layout.tp, pp=layout.pp):
        raise ValueError(f"{layout} has an axis that generation does not support: give tp and pp only")
    dp = layout.dp(training.world_size)
    ranks = RankGenerator(tp=layout.tp, ep=1, dp=dp, pp=layout.pp, cp=1, order=_ORDER)
    timeout = timedelta(seconds=timeout_s)
    with contextlib.ExitStack() as stack:

        def group_of(axis: str, backend: str | None = None) -> dist.ProcessGroup:
            mine, _ = dist.new_subgroups_by_enumeration(
                ranks.get_ranks(axis), timeout=timeout, backend=backend
            )
            stack.callback(dist.destroy_process_group, mine)
            return mine

        pp_group, dp_group = group_of("pp"), group_of("dp")
        yield Topology(
            layout=layout,
            world_size=training.world_size,
            rank=training.rank,
            dp=dp,
            device=training.device,
            tp_group=group_of("tp"),
            pp_group=pp_group,
            pp_host_group=pp_group if training.pp_host_group is training.pp_group else group_of("pp", "gloo"),
            pp_channels=(pp_group,) * NUM_CHANNELS,
            cp_group=group_of("cp"),
            dp_group=dp_group,
            dp_cp_group=dp_group,
        )
        dist.barrier()  # no rank closes a connection that another rank still reads from
