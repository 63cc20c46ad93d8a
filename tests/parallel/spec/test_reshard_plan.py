"""A reshard plan: every element arrives once, from a rank that holds it, through small buffers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_training import CONFIG

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.reshard_plan import layers_of_stage, plan_reshard
from glm_rlhf.parallel.spec.sharding import read_shard, shards_of
from glm_rlhf.parallel.spec.weight_map import names_within, weights_of

CHATGLM = replace(CONFIG, family="chatglm")
SANDWICH = replace(CONFIG, family="glm4", has_sandwich_norms=True)
TIED = replace(CONFIG, has_tied_head=True)
EIGHT_LAYERS = replace(CONFIG, num_layers=8, num_kv_heads=4, has_qkv_bias=False)

PAIRS = [
    (CONFIG, {"tp": 2}, {"pp": 2}, 4),
    (CONFIG, {"tp": 4}, {}, 4),
    (CONFIG, {}, {"tp": 4}, 4),
    (CONFIG, {"tp": 2, "pp": 2}, {"tp": 4}, 4),
    (CONFIG, {"pp": 4}, {"tp": 2}, 4),
    (CONFIG, {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}, {"pp": 4}, 4),
    (CONFIG, {"cp": 2, "tp": 2}, {"tp": 4}, 4),
    (CHATGLM, {"tp": 2}, {"tp": 4}, 4),
    (CHATGLM, {"tp": 4, "pp": 2}, {"tp": 2}, 8),
    (SANDWICH, {"pp": 2}, {"tp": 2, "pp": 2}, 4),
    (TIED, {"pp": 2}, {"pp": 4}, 4),
    (TIED, {"tp": 2}, {"pp": 2}, 4),
    (EIGHT_LAYERS, {"tp": 8}, {"tp": 2, "pp": 2}, 8),
    (EIGHT_LAYERS, {"tp": 2, "pp": 4, "vpp": 2}, {"tp": 8}, 16),
]


def parameters_of(config, layout, world_size, wholes):
    """Per rank: its parameters by name, sliced from the whole tensors one by one."""
    by_rank = []
    for rank in range(world_size):
        stage, tp_rank = rank // (world_size // layout.pp), rank % layout.tp
        weights = weights_of(
            config,
            layers=[layer for chunk in layers_of_stage(config, layout, stage) for layer in chunk],
            has_embedding=stage == 0,
            has_head=stage == layout.pp - 1,
        )
        by_rank.append(
            {
                shard.name: read_shard(
                    shard,
                    lambda piece, out: out.copy_(
                        wholes[piece.name].narrow(piece.dim, piece.start, piece.length)
                    ),
                    dtype=torch.float64,
                )
                for weight in weights
                for shard in shards_of(weight, config, tp_rank=tp_rank, tp_size=layout.tp)
            }
        )
    return by_rank


def whole_tensors(config):
    """Every tensor of the model, all elements distinct."""
    wholes, first = {}, 0
    for weight in weights_of(config, layers=range(config.num_layers)):
        for name, shape in names_within(weight, config).items():
            count = torch.Size(shape).numel()
            wholes[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape)
            first += count
    return wholes


@pytest.mark.parametrize("buffer_elements", [300, 10**9])
@pytest.mark.parametrize("config, source, target, world_size", PAIRS)
def test_every_rank_gets_its_parameters(config, source, target, world_size, buffer_elements):
    source, target = Layout(**source), Layout(**target)
    plan = plan_reshard(config, source, target, world_size=world_size, buffer_elements=buffer_elements)
    wholes = whole_tensors(config)
    held = parameters_of(config, source, world_size, wholes)
    expected = parameters_of(config, target, world_size, wholes)
    found = [
        {
            name: held[rank][name]
            if name in plan.kept[rank]
            else torch.full(shape, -1.0, dtype=torch.float64)
            for name, shape in plan.shapes[rank].items()
        }
        for rank in range(world_size)
    ]
    num_written = Counter()
    for move in (*plan.copies, *(move for moves in plan.rounds for move in moves)):
        part = held[move.source_rank][move.source_name].narrow(move.dim, move.source_start, move.length)
        assert part.numel() == move.num_elements
        place = found[move.target_rank][move.target_name].narrow(move.dim, move.target_start, move.length)
        assert (place == -1).all(), "a number arrives twice"
        place.copy_(part)
        num_written[move.target_rank] += move.num_elements
    for rank in range(world_size):
        assert list(found[rank]) == list(expected[rank])
        for name, tensor in expected[rank].items():
            assert torch.equal(found[rank][name], tensor), name
        kept = sum(tensor.numel() for name, tensor in expected[rank].items() if name in plan.kept[rank])
        assert num_written[rank] + kept == sum(tensor.numel() for tensor in expected[rank].values())
    for moves in plan.rounds:
        for side in ("source_rank", "target_rank"):
            totals = Counter()
            for move in moves:
                assert move.source_rank != move.target_rank
                totals[getattr(move, side)] += move.num_elements
            assert max(totals.values()) <= buffer_elements
    if buffer_elements == 10**9:
        assert len(plan.rounds) <= 1


@pytest.mark.parametrize("axes, world_size", [({"tp": 2}, 4), ({"pp": 4}, 4), ({"tp": 2, "pp": 2}, 8)])
def test_equal_layouts_move_nothing(axes, world_size):
    training = Layout(**axes, sequence_parallel=axes.get("tp", 1) > 1)
    plan = plan_reshard(CONFIG, training, Layout(**axes), world_size=world_size, buffer_elements=100)
    assert plan.copies == plan.rounds == ()
    assert all(kept == set(shapes) for kept, shapes in zip(plan.kept, plan.shapes, strict=True))


def test_what_a_rank_has_is_not_sent_to_it():
    # From 2 stages to 1, 4 ranks: ranks 0 and 1 have the first half of the model, 2 and 3 the second.
    plan = plan_reshard(CONFIG, Layout(pp=2), Layout(), world_size=4, buffer_elements=10**9)
    (moves,) = plan.rounds
    assert {(move.source_rank // 2, move.target_rank // 2) for move in moves} == {(0, 1), (1, 0)}
    assert plan.copies == ()
    # Both copies of each half serve: no rank sends to two.
    assert {move.source_rank for move in moves} == {0, 1, 2, 3}
    assert len({(move.source_rank, move.target_rank) for move in moves}) == 4


def test_stages_move_at_the_same_time():
    plan = plan_reshard(CONFIG, Layout(tp=4), Layout(pp=4), world_size=4, buffer_elements=3000)
    busy = [len({move.target_rank for move in moves}) for moves in plan.rounds]
    assert sum(busy) / len(busy) > 2, "most rounds serve most ranks"


def test_a_buffer_below_one_row_is_refused():
    with pytest.raises(ValueError, match=r"buffer holds 31 elements, one row or column of .* has"):
        plan_reshard(CONFIG, Layout(tp=2), Layout(), world_size=2, buffer_elements=31)


@pytest.mark.parametrize(
    "source, target, world_size, message",
    [
        ({"tp": 2}, {"tp": 3}, 6, "num_heads 8"),
        ({"tp": 2}, {"pp": 2}, 3, "does not divide the world of 3"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(source, target, world_size, message):
    with pytest.raises(ValueError, match=message):
        plan_reshard(CONFIG, Layout(**source), Layout(**target), world_size=world_size, buffer_elements=1000)
