"""Layouts: valid sizes, and one sentence with the numbers for invalid ones."""

from dataclasses import replace

import pytest

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.presets import PRESETS, preset

TINY = preset("tiny-glm")


@pytest.mark.parametrize(
    "axes, multiple",
    [
        ({}, 1),
        ({"tp": 4}, 1),
        ({"tp": 4, "sequence_parallel": True}, 4),
        ({"cp": 2}, 4),
        ({"cp": 2, "tp": 4}, 4),
        ({"cp": 4, "tp": 2, "sequence_parallel": True}, 16),
    ],
)
def test_streams_are_filled_so_that_every_axis_cuts_them_evenly(axes, multiple):
    layout = Layout(**axes)
    assert layout.token_multiple == multiple
    chunks = 2 * layout.cp if layout.cp > 1 else 1
    assert multiple % chunks == 0
    assert multiple // layout.cp % (layout.tp if layout.sequence_parallel else 1) == 0


def test_data_parallelism_takes_the_rest_of_the_world():
    layout = Layout(tp=2, pp=3, vpp=2, cp=2)
    assert layout.num_model_ranks == 12
    assert [layout.dp(world) for world in (12, 36)] == [1, 3]
    for world in (1, 6, 13):
        with pytest.raises(
            ValueError, match=rf"tp 2 × pp 3 × cp 2 = 12 does not divide the world of {world} ranks.*of 12"
        ):
            layout.dp(world)


@pytest.mark.parametrize(
    "axes, sentence",
    [
        ({"tp": 0}, "parallel.tp is 0, it must be at least 1"),
        ({"pp": -1}, "parallel.pp is -1"),
        ({"cp": 0}, "parallel.cp is 0"),
        ({"vpp": 0, "pp": 2}, "parallel.vpp is 0"),
        ({"vpp": 2}, "parallel.vpp is 2 with parallel.pp 1"),
        ({"sequence_parallel": True}, "sequence_parallel needs parallel.tp above 1"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(axes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Layout(**axes)


@pytest.mark.parametrize(
    "axes, changes, sentence",
    [
        ({"pp": 3}, {}, "num_layers 4 of the model is not a multiple of pp 3: give a divisor of 4"),
        ({"pp": 8}, {}, "num_layers 4 of the model is not a multiple of pp 8"),
        ({"pp": 4, "vpp": 2}, {}, "num_layers 4 of the model is not a multiple of pp × vpp 8"),
        ({"tp": 3}, {"vocab_size": 96, "ffn_size": 96}, "num_heads 8 of the model is not a multiple of tp 3"),
        ({"tp": 4}, {"ffn_size": 98}, "ffn_size 98 of the model is not a multiple of tp 4"),
        (
            {"tp": 4},
            {"vocab_size": 6},
            "vocab_size 6 of the model is too small for tp 4: a rank would have no",
        ),
        ({"tp": 4}, {"num_heads": 12, "num_kv_heads": 6}, "num_kv_heads 6 of the model and tp 4"),
    ],
)
def test_a_model_that_does_not_split_is_refused_with_both_numbers(axes, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Layout(**axes).check_model(replace(TINY, **changes))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_splits_over_eight_ranks_of_a_host(name):
    for tp in (1, 2, 4, 8):
        Layout(tp=tp, sequence_parallel=tp > 1).check_model(PRESETS[name])
