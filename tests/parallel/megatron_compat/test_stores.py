"""The world's store keeps words, and a group counts its collectives."""

import torch
import torch.distributed as dist
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat.stores import num_collectives, world_store

STORE = Upstream(patch="stores.world_store", symbol="torch.distributed.distributed_c10d:_get_default_store")
COUNT = Upstream(
    patch="stores.num_collectives", symbol="torch.distributed:ProcessGroup._get_sequence_number_for_group"
)


def test_the_store_of_the_world_keeps_what_is_set(topology):
    store = world_store()
    assert isinstance(store, dist.Store), moved(STORE, f"returns a {type(store).__name__}")
    store.set("word", "kept")
    assert world_store().get("word") == b"kept", moved(STORE, "returns another store each time")


def test_a_group_counts_each_of_its_collectives_and_no_other_group_s(topology):
    before, others = num_collectives(topology.tp_group), num_collectives(topology.dp_group)
    for _ in range(3):
        dist.all_reduce(torch.ones(()), group=topology.tp_group)
    after = num_collectives(topology.tp_group)
    assert after == before + 3, moved(COUNT, f"counts {after - before} for three collectives")
    assert num_collectives(topology.dp_group) == others, moved(COUNT, "counts those of other groups")
