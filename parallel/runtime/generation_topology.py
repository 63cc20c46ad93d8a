"""A second layout of the same ranks, beside the one that Megatron-core knows.

Training modules find their groups in Megatron-core's global state, which holds one layout. Generation reads
parameter tensors and is told its groups, so it may have others: these.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator

from glm_rlhf.parallel.runtime.topology import DEFAULT_TIMEOUT_S, Topology
from glm_rlhf.parallel.spec.layout import Layout

_ORDER = "tp-cp-ep-dp-pp"
"""Megatron-core's: neighbours share layers, stages are far apart."""


@contextlib.contextmanager
def generation_topology(
    layout: Layout, first: Topology, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[Topology]:
    """Return, as a context manager, this rank's place in a layout for generation; every rank must enter.

    Ranks are ordered as Megatron-core orders them: equal axes have equal groups, though not the same
    objects. Nothing of Megatron-core's global state changes.

    Args:
        layout: tensor and pipeline parallelism; the rest of the world are copies of the model.
        first: the topology that is active.
        timeout_s: seconds after which a collective that some rank never entered fails.

    Raises:
        ValueError: the layout does not divide the world, or names an axis that only training has.
    """
    if layout != Layout(tp=layout.tp, pp=layout.pp):
        raise ValueError(f"{layout} has an axis that generation lacks: give tp and pp only")
    dp = layout.dp(first.world_size)
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
            world_size=first.world_size,
            rank=first.rank,
            dp=dp,
            device=first.device,
            tp_group=group_of("tp"),
            pp_group=pp_group,
            pp_host_group=pp_group if first.pp_host_group is first.pp_group else group_of("pp", "gloo"),
            cp_group=group_of("cp"),
            dp_group=dp_group,
            dp_cp_group=dp_group,
        )
        dist.barrier()  # nobody closes a connection that another rank still reads from
