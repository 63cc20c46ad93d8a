"""Topologies: groups for every layout, in an existing or a new world, and destroyed afterwards."""

import subprocess
import sys
import textwrap
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from machine_load import slowdown
from megatron.core import parallel_state

from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

LAYOUTS = (
    {"tp": 2, "sequence_parallel": True},
    {"tp": 2, "pp": 2},
    {"pp": 2, "vpp": 2},
    {"cp": 2},
    {"cp": 2, "tp": 2},
    {"pp": 4},
)


def groups_in_turn(layouts):
    """Of each layout: this rank's place, the ranks of its groups, and what is left when it is over."""
    answers = []
    for axes in layouts:
        with open_topology(Layout(**axes)) as topology:
            groups = {
                name: dist.get_process_group_ranks(getattr(topology, f"{name}_group"))
                for name in ("tp", "pp", "cp", "dp", "dp_cp", "pp_host")
            }
            for name in groups:
                total = torch.ones(())
                dist.all_reduce(total, group=getattr(topology, f"{name}_group"))
                assert total.item() == len(groups[name])
            answers.append(
                {
                    "rank": topology.rank,
                    "place": (topology.tp_rank, topology.pp_rank, topology.cp_rank, topology.dp_rank),
                    "dp": topology.dp,
                    "groups": groups,
                    "last": (topology.is_last_stage, topology.last_stage_rank),
                    "reports": topology.is_main_rank,
                    "device": topology.device.type,
                }
            )
        left = (parallel_state.model_parallel_is_initialized(), len(dist.distributed_c10d._world.pg_map))
        assert left == (False, 1), "the world alone stays"
    return answers


def test_every_layout_in_turn_inside_one_world(ranks):
    by_rank = ranks.run(groups_in_turn, LAYOUTS)
    for index, axes in enumerate(LAYOUTS):
        layout = Layout(**axes)
        found = [answers[index] for answers in by_rank]
        assert [answer["rank"] for answer in found] == [0, 1, 2, 3]
        assert len({answer["place"] for answer in found}) == 4, "every place is taken once"
        assert [answer["reports"] for answer in found] == [True, False, False, False]
        for rank, answer in enumerate(found):
            assert answer["dp"] == layout.dp(4)
            assert answer["device"] == "cpu"
            sizes = {
                "tp": layout.tp,
                "pp": layout.pp,
                "cp": layout.cp,
                "dp": layout.dp(4),
                "dp_cp": layout.dp(4) * layout.cp,
                "pp_host": layout.pp,
            }
            for position, (axis, ranks_of) in enumerate(answer["groups"].items()):
                assert len(ranks_of) == sizes[axis]
                assert rank in ranks_of
                if position < 4:  # a rank's place is its position in the group
                    assert ranks_of.index(rank) == answer["place"][position]
            last = answer["groups"]["pp"][-1]
            assert answer["last"] == (rank == last, last)


def fail_inside_and_outside():
    """Messages for impossible topologies, each followed by a valid one."""
    said = []

    def attempt(*layouts, error=None):
        try:
            with open_topology(layouts[0]):
                if layouts[1:]:
                    attempt(*layouts[1:], error=error)
                elif error is not None:
                    raise error
        except Exception as found:
            said.append(f"{type(found).__name__}: {found}")

    attempt(Layout(tp=3))
    attempt(Layout(tp=2), Layout(pp=2))  # the outer one continues
    attempt(Layout(cp=4), error=KeyError("of the block"))
    assert not parallel_state.model_parallel_is_initialized()
    groups_in_turn([{"tp": 4}])
    return said


def test_a_topology_that_cannot_be_says_why_and_leaves_nothing_behind(ranks):
    refused = (
        "ValueError: tp 3 × pp 1 × cp 1 = 3 does not divide the world of 4 ranks: launch a multiple of 3"
    )
    active = "ValueError: a topology is already active in this process: close it before opening another"
    assert ranks.run(fail_inside_and_outside) == [[refused, active, "KeyError: 'of the block'"]] * 4


def wait_for_a_rank_that_does_not_come(timeout_s):
    """Seconds until a collective of the topology's groups fails."""
    import time

    with open_topology(Layout(tp=4), timeout_s=timeout_s) as topology:
        start, waited = time.monotonic(), None
        if topology.rank != 3:
            try:
                dist.all_reduce(torch.ones(()), group=topology.tp_group)
            except RuntimeError:
                waited = time.monotonic() - start
        dist.barrier()  # of the world, whose own timeout is another
        return waited


def test_a_missing_rank_fails_a_collective_after_the_timeout(ranks):
    *waited, absent = ranks.run(wait_for_a_rank_that_does_not_come, 2.0)
    assert absent is None
    # One rank waits for its two seconds, the others until it closes; a loaded machine adds some time.
    assert all(seconds is not None and seconds < 30 * slowdown() for seconds in waited), waited
    assert max(waited) >= 1.5


def test_one_process_makes_a_world_of_its_own_and_takes_it_down(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for timeout_s in (5.0, 90.0):
        with open_topology(Layout(), timeout_s=timeout_s) as topology:
            assert (topology.world_size, topology.rank, topology.dp, topology.is_main_rank) == (1, 0, 1, True)
            options = topology.tp_group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(seconds=timeout_s)
        assert not dist.is_initialized()
    with (
        pytest.raises(ValueError, match="= 2 does not divide the world of 1 ranks"),
        open_topology(Layout(tp=2)),
    ):
        pytest.fail("the block ran")
    assert not dist.is_initialized()


def test_more_ranks_than_devices_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2 on a host with 2 CUDA devices.*nproc-per-node"):
        open_topology(Layout()).__enter__()
    assert not dist.is_initialized()


LAUNCHED = """
    import os, pathlib, sys, torch, torch.distributed as dist
    from glm_rlhf.parallel.spec.layout import Layout
    from glm_rlhf.parallel.runtime.topology import open_topology
    # A file for each rank: in one pipe their lines may mix.
    said = pathlib.Path(sys.argv[1], os.environ["RANK"]).open("w")
    for layout in (Layout(tp=2), Layout(pp=2)):
        with open_topology(layout, timeout_s=60) as place:
            total = torch.tensor([float(place.rank + 1)])
            dist.all_reduce(total, group=place.tp_group)
        assert not dist.is_initialized()
        print(place.rank, place.world_size, place.tp_rank, place.pp_rank, total.item(), file=said)
    try:
        with open_topology(Layout(tp=4)):
            pass
    except ValueError as error:
        print(place.rank, error, file=said)
"""


def test_torchrun_ranks_make_a_world_again_and_again(tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(textwrap.dedent(LAUNCHED))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = [tmp_path / "0", tmp_path / "1"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused = "tp 4 × pp 1 × cp 1 = 4 does not divide the world of 2 ranks: launch a multiple of 4"
    assert [path.read_text().splitlines() for path in said] == [
        ["0 2 0 0 3.0", "0 2 0 0 1.0", f"0 {refused}"],
        ["1 2 1 0 3.0", "1 2 0 1 2.0", f"1 {refused}"],
    ]
