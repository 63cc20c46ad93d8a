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
from glm_rlhf.parallel.spec.pipeline_order import Pass, num_in_flight, num_padding_micro_batches, stage_order


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
