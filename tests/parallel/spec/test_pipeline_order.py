"""The order of passes is the one in which a stage runs them."""

import pytest
import torch
from tiny_training import Case, make_chunks

from benchmarks.harness.one_rank_world import world_of_one_rank
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.pipeline_order import (
    Pass,
    Transfer,
    deadlock,
    num_in_flight,
    num_padding_micro_batches,
    stage_actions,
    stage_order,
)


def recorded(layout: Layout, stage: int, num_micro_batches: int, *, forward_only: bool) -> list[Pass]:
    """Passes of a real stage: micro-batches are distinguished by the lengths of their streams."""
    found: list[Pass] = []
    num_padding = num_padding_micro_batches(layout, num_micro_batches)
    with world_of_one_rank(stage, layout.pp), open_topology(layout) as topology:
        chunks = make_chunks(Case(), topology)
        state = TrainingState(chunks, AdamSettings(lr=0.0), topology=topology)
        batches = [pack([torch.zeros(index + 2, dtype=torch.int64)]) for index in range(num_micro_batches)]
        seen_padding = [0] * len(chunks)

        def watch(number):
            def note(_module, arguments, output):
                length = arguments[0].packed.num_tokens
                index = num_padding + length - 2
                if length == 1:
                    index, seen_padding[number] = seen_padding[number], seen_padding[number] + 1
                found.append(Pass("forward", index, number))
                if output.requires_grad:
                    output.register_hook(lambda _: found.append(Pass("backward", index, number)))

            return note

        for number, chunk in enumerate(chunks):
            chunk.register_forward_hook(watch(number))
        run_micro_batches(
            chunks if forward_only else state.chunks,
            batches,
            lambda model, hidden_TD, _: (None if forward_only else hidden_TD.sum(), None),
            topology=topology,
            forward_only=forward_only,
        )
    return found


@pytest.mark.parametrize(
    ("layout", "counts"),
    [(Layout(pp=2), (1, 5)), (Layout(pp=4), (0, 2, 6)), (Layout(pp=2, vpp=2), (3, 6))],
    ids=["pp2", "pp4", "pp2 vpp2"],
)
def test_the_order_is_that_of_real_stages(layout, counts):
    for count in counts:
        for stage in {0, 1, layout.pp - 1}:
            expected = stage_order(layout, count, stage=stage)
            found = recorded(layout, stage, count, forward_only=False)
            # A middle chunk's output has no gradient before the next one's comes: hooks fire all the same.
            assert found == expected, (count, stage)


def test_the_order_without_gradients():
    layout = Layout(pp=2, vpp=2)
    expected = stage_order(layout, 3, stage=1, forward_only=True)
    assert recorded(layout, 1, 3, forward_only=True) == expected


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=4), Layout(pp=2, vpp=2), Layout(pp=4, vpp=3)])
@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_every_pass_runs_once_and_waits_no_longer_than_stated(layout, count):
    total = count + num_padding_micro_batches(layout, count)
    for stage in range(layout.pp):
        order = stage_order(layout, count, stage=stage)
        assert len(set(order)) == len(order) == 2 * total * layout.vpp
        waiting = most = 0
        for one in order:
            waiting += 1 if one.kind == "forward" else -1
            most = max(most, waiting)
        assert most == num_in_flight(layout, count, stage=stage)


def all_actions(layout: Layout, count: int, *, forward_only: bool) -> list[list[Pass | Transfer]]:
    return [stage_actions(layout, count, stage=i, forward_only=forward_only) for i in range(layout.pp)]


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("vpp", [1, 2, 3])
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_stages_never_wait_for_each_other_and_every_message_is_taken(pp, vpp, forward_only):
    layout = Layout(pp=pp, vpp=vpp if pp > 1 else 1)
    for count in (0, 1, 2, 3, 5, 8, 13):
        stages = all_actions(layout, count, forward_only=forward_only)
        assert deadlock(stages) is None, count
        total = count + num_padding_micro_batches(layout, count)
        num_messages = total * (layout.pp * layout.vpp - 1) * (1 if forward_only else 2)
        for kind in ("send", "receive") if pp > 1 else ():
            found = [
                one for stage in stages for one in stage if isinstance(one, Transfer) and one.kind == kind
            ]
            assert len(found) == num_messages


def test_one_stream_per_pair_of_stages_would_not_end():
    """Why activations and gradients have groups of their own where NCCL carries them."""
    for layout in (Layout(pp=2), Layout(pp=4), Layout(pp=2, vpp=2)):
        stages = all_actions(layout, 8, forward_only=False)
        assert deadlock(stages, one_stream_per_pair=True) is not None
    forward = all_actions(Layout(pp=4), 8, forward_only=True)
    assert deadlock(forward, one_stream_per_pair=True) is None
    # Two stages of several chunks send activations to each other.
    assert (
        deadlock(all_actions(Layout(pp=2, vpp=2), 8, forward_only=True), one_stream_per_pair=True) is not None
    )


def test_what_a_wrong_list_does_is_said():
    layout = Layout(pp=3)
    good = all_actions(layout, 4, forward_only=False)

    def spoiled(change) -> str | None:
        stages = [list(stage) for stage in good]
        change(stages)
        return deadlock(stages)

    receives = [i for i, one in enumerate(good[1]) if isinstance(one, Transfer) and one.kind == "receive"]
    sends = [i for i, one in enumerate(good[1]) if isinstance(one, Transfer) and one.kind == "send"]
    same = [i for i in receives if good[1][i].tensor == "activation"][:2]

    def swap(stages):
        first, second = same
        stages[1][first], stages[1][second] = stages[1][second], stages[1][first]

    assert "gets what" in spoiled(swap)
    assert "wait for each other" in spoiled(lambda stages: stages[1].pop(receives[-1]))
    assert "gets what" in spoiled(lambda stages: stages[1].pop(sends[0]))
    assert "wait for each other" in spoiled(lambda stages: stages[1].pop(sends[-1]))
    assert "wait for each other" in spoiled(lambda stages: stages[1].insert(0, good[1][receives[-1]]))
