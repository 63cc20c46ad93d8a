"""The schedule: any number of micro-batches of any lengths, through every pipeline, in order."""

import pytest
import torch
from tiny_training import READS_GRADIENT, Case, assert_equal, loss_of, make_batches, make_chunks, run_cases

from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.optim.training_state import TrainingState
from glm_rlhf.parallel.pipeline.schedule import collect_rows, run_micro_batches
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

# Lengths of nine different micro-batches; the last sequence of some has one token.
UNEQUAL = tuple((3 * n % 7 + 2, n + 1, 1) if n % 2 else (2 * n + 1,) for n in range(1, 10))
EIGHT_LAYERS = {"num_layers": 8}


PIPELINES = [
    {"pp": 4},
    {"pp": 4, "vpp": 2},
    {"pp": 2, "vpp": 4},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
]
QUICK = ((0, 1), (1, 3), (2, 9), (3, 3))
"""Pipelines, by number, with micro-batches that `make test` runs; `make slow` runs all."""


@pytest.mark.parametrize(
    "axes, num_micro_batches",
    [
        pytest.param(axes, count, marks=[] if (number, count) in QUICK else pytest.mark.slow)
        for number, axes in enumerate(PIPELINES)
        for count in (1, 3, 9)
    ],
    ids=str,
)
def test_unequal_micro_batches_equal_one_rank(ranks, axes, num_micro_batches):
    case = Case(lengths=UNEQUAL[:num_micro_batches], changes=EIGHT_LAYERS)
    (expected,) = run_cases({}, [case])
    found = ranks.run(run_cases, axes, [case])
    assert_equal([rank[0] for rank in found], expected)


def test_streams_of_one_token_and_shards_of_padding_alone_equal_one_rank(ranks):
    # With 16 chunks per stream, most shards of these hold only padding.
    case = Case(lengths=((1, 2), (3,), (1, 1, 1, 2)))
    (expected,) = run_cases({}, [case])
    for axes in ({"cp": 4}, {"tp": 2, "cp": 2, "sequence_parallel": True}):
        assert_equal([rank[0] for rank in ranks.run(run_cases, axes, [case])], expected)


def outputs_of(axes):
    """On each rank: losses that are returned as their own output, and outputs of micro-batches by index."""
    with open_topology(Layout(**axes)) as topology:
        case = Case()
        chunks, batches = make_chunks(case, topology), make_batches(case, topology)
        state = TrainingState(chunks, READS_GRADIENT, topology=topology)

        def itself(model, hidden_TD, index):
            loss, _ = loss_of(case, model, hidden_TD, batches[index])
            return loss, loss

        state.zero_grad()
        losses = run_micro_batches(state.chunks, batches, itself, topology=topology, forward_only=False)
        seen = run_micro_batches(
            chunks,
            batches,
            lambda _, hidden_TD, index: (None, (index, hidden_TD.shape[0], hidden_TD.requires_grad)),
            topology=topology,
            forward_only=True,
        )
        none = run_micro_batches(chunks, [], itself, topology=topology, forward_only=True)
        return topology.is_last_stage, [loss.item() for loss in losses], seen, none


def test_outputs_come_in_order_on_the_last_stage_and_stay_what_they_are(ranks):
    _, expected, _, _ = outputs_of({})
    for axes in ({"pp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2}):
        for is_last, losses, seen, none in ranks.run(outputs_of, axes):
            # The schedule frees a loss after its backward; the output is unchanged.
            assert losses == (pytest.approx(expected, rel=1e-6) if is_last else [])
            wanted = [(0, 15, False), (1, 17, False), (2, 17, False), (3, 13, False)]
            assert seen == (wanted if is_last else [])
            assert none == []


def train_on_constants(axes):
    """The gradient norm when the loss of two micro-batches of four depends on nothing."""
    with open_topology(Layout(**axes)) as topology:
        case = Case()
        chunks, batches = make_chunks(case, topology), make_batches(case, topology)
        state = TrainingState(chunks, READS_GRADIENT, topology=topology)
        mine = list(enumerate(batches))[topology.dp_rank :: topology.dp]

        def step(model, hidden_TD, index):
            number, batch = mine[index]
            if number % 3 == 0:
                return torch.zeros(()), None
            return loss_of(case, model, hidden_TD, batch)

        state.zero_grad()
        batches = [batch for _, batch in mine]
        run_micro_batches(state.chunks, batches, step, topology=topology, forward_only=False)
        return state.step().grad_norm


def test_a_micro_batch_without_a_gradient_leaves_the_others(ranks):
    expected = train_on_constants({})
    assert expected > 0.1
    for axes in ({"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2}):
        assert ranks.run(train_on_constants, axes) == pytest.approx([expected] * 4, rel=1e-5)


def collect_positions(axes):
    """Every rank's view of rows that say which token they are."""
    with open_topology(Layout(**axes)) as topology:
        multiple = topology.layout.token_multiple
        batches = [pack([torch.arange(n)], multiple=multiple) for n in (5, 16, 1)]
        outputs = []
        for batch in batches if topology.is_last_stage else ():
            mine = share(batch, cp_rank=topology.cp_rank, cp_size=topology.layout.cp)
            row_T = mine.take(torch.arange(batch.num_tokens)).float()
            outputs.append(torch.stack((row_T, -row_T), dim=1))
        rows = collect_rows(outputs, batches, 2, topology=topology)
        return [torch.equal(r, torch.stack((t := torch.arange(len(r)).float(), -t), dim=1)) for r in rows]


def test_rows_are_collected_in_stream_order_on_every_rank(ranks):
    for axes in ({"cp": 4}, {"cp": 2, "pp": 2}, {"tp": 2, "pp": 2, "sequence_parallel": True}):
        assert ranks.run(collect_positions, axes) == [[True] * 3] * 4
