"""Links between ranks, and the file of measured rates."""

import json
from dataclasses import asdict, fields, replace

import pytest

from glm_rlhf.engine.cost.hardware import GPUS, Cluster, Rates, assumed_rates, read_rates

RATES = replace(
    assumed_rates(GPUS["h100"], network_bytes_per_s=50e9),
    node_bytes_per_s=300.0,
    network_bytes_per_s=40.0,
    node_latency_s=1.0,
    network_latency_s=2.0,
)
CLUSTER = Cluster(gpu=GPUS["h100"], num_gpus=64, gpus_per_node=8, rates=RATES, usable_bytes=1)


@pytest.mark.parametrize(
    ("num_ranks", "stride", "expected"),
    [
        (8, 1, (300.0, 1.0)),  # a node
        (2, 4, (300.0, 1.0)),
        (4, 2, (300.0, 1.0)),
        (16, 1, (300.0, 2.0)),  # all eight adapters of a node together outdo the link within it
        (8, 4, (80.0, 2.0)),  # two ranks a node
        (8, 8, (40.0, 2.0)),  # one rank a node
        (2, 32, (40.0, 2.0)),
        (1, 1, (300.0, 1.0)),
    ],
)
def test_a_group_of_ranks_has_the_slowest_link_on_its_way(num_ranks, stride, expected):
    assert CLUSTER.link(num_ranks=num_ranks, stride=stride) == expected


def test_assumed_rates_are_named_so_and_below_the_peaks():
    for gpu in GPUS.values():
        rates = assumed_rates(gpu, network_bytes_per_s=50e9)
        assert "assumed" in rates.source
        assert "not measured" in rates.source
        assert rates.flop_per_s < gpu.peak_flop_per_s
        assert rates.bytes_per_s < gpu.peak_bytes_per_s


def test_a_file_of_rates_is_read_back(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(asdict(RATES)))
    assert read_rates(path) == RATES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flop_per_s": 0}, "flop_per_s is 0, it must be a number above 0"),
        ({"layer_s": True}, "layer_s is True"),
        ({"source": 3}, "source is 3, it must be text"),
        ({"flops": 1.0}, "flops"),
        ({"bytes_per_s": float("nan")}, "bytes_per_s is nan"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(asdict(RATES) | change))
    with pytest.raises(ValueError, match=message):
        read_rates(path)


def test_a_missing_name_and_no_json_are_refused(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON: .*glm-rlhf bench"):
        read_rates(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=fields(Rates)[0].name):
        read_rates(path)
