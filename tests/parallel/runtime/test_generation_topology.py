"""A generation layout has separate groups, and does not change those of training."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from glm_rlhf.parallel.runtime.generation_topology import generation_topology
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

AXES = ("tp", "pp", "pp_host", "cp", "dp", "dp_cp")


def ranks_of(topology):
    return {axis: dist.get_process_group_ranks(getattr(topology, f"{axis}_group")) for axis in AXES}


def enter(first_axes, second_axes):
    """On each rank: groups of the training and the generation topology, and those left afterwards."""
    with open_topology(Layout(**first_axes)) as first:
        before, num_groups = ranks_of(first), len(dist.distributed_c10d._world.pg_map)
        with generation_topology(Layout(**second_axes), first) as second:
            for axis in AXES:
                total = torch.ones(())
                dist.all_reduce(total, group=getattr(second, f"{axis}_group"))
                assert total.item() == len(ranks_of(second)[axis])
            found = ranks_of(second), second.dp, second.tp_rank, second.pp_rank, second.is_last_stage
            assert parallel_state.get_tensor_model_parallel_group() is first.tp_group
        assert len(dist.distributed_c10d._world.pg_map) == num_groups, "its groups are gone"
        assert ranks_of(first) == before
        total = torch.ones(())
        dist.all_reduce(total, group=first.tp_group)
        assert total.item() == first.layout.tp
        return found


def place_of(axes):
    with open_topology(Layout(**axes)) as topology:
        return ranks_of(topology), topology.dp, topology.tp_rank, topology.pp_rank, topology.is_last_stage


@pytest.mark.parametrize(
    "first, second",
    [
        ({"tp": 2}, {"pp": 2}),
        ({"pp": 4}, {"tp": 2, "pp": 2}),
        ({"cp": 2, "tp": 2}, {"tp": 4}),
        ({"tp": 4}, {}),
        ({"pp": 2, "vpp": 2}, {"pp": 2}),
    ],
)
def test_ranks_stand_where_a_first_topology_would_put_them(ranks, first, second):
    assert ranks.run(enter, first, second) == ranks.run(place_of, second)


@pytest.mark.parametrize("axes", [{"cp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "sequence_parallel": True}])
def test_axes_of_training_are_refused(axes):
    with open_topology(Layout()) as first:
        with (
            pytest.raises(ValueError, match="give tp and pp only"),
            generation_topology(Layout(**axes), first),
        ):
            pass
        with pytest.raises(ValueError, match="world of 1"), generation_topology(Layout(tp=2), first):
            pass
