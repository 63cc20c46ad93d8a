"""Megatron-core lists the groups that it creates; none of them outlives a topology."""

import torch.distributed as dist
from megatron.core import parallel_state
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat.process_groups import created_groups

LIST = Upstream(
    patch="process_groups.created_groups", symbol="megatron.core.parallel_state:_global_process_group_list"
)


def test_every_group_of_the_topology_is_listed_once(topology):
    groups = created_groups()
    for axis in ("tp", "pp", "cp", "dp", "dp_cp"):
        group = getattr(topology, f"{axis}_group")
        assert [one for one in groups if one is group] == [group], moved(LIST, f"lacks the group of {axis}")
    assert dist.group.WORLD not in groups
    assert len({id(group) for group in groups}) == len(groups)
    parallel_state.destroy_model_parallel()
    assert created_groups() == [], moved(LIST, "is not emptied by destroy_model_parallel")
    for group in groups:
        dist.destroy_process_group(group)
