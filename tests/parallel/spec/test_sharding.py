"""Tensor-parallel shards split every weight as the layers expect."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_rlhf.parallel.spec.presets import preset
from glm_rlhf.parallel.spec.sharding import place_shard, read_shard, shards_of
from glm_rlhf.parallel.spec.weight_map import names_within, weights_of


def weight_of(config, suffix):
    (weight,) = [w for w in weights_of(config, layers=[0]) if w.name.endswith(suffix)]
    return weight


def read(config, suffix, tensors, tp_rank, tp_size):
    """All parameters of one rank that come from the weight, by the last words of their names."""

    def fill(piece, out):
        out.copy_(tensors[piece.name].narrow(piece.dim, piece.start, piece.length))

    shards = shards_of(weight_of(config, suffix), config, tp_rank=tp_rank, tp_size=tp_size)
    return {s.name.split(".", 3)[3]: read_shard(s, fill, dtype=torch.float32) for s in shards}


def random_tensors(config, suffix):
    torch.manual_seed(0)
    return {n: torch.randn(s) for n, s in names_within(weight_of(config, suffix), config).items()}


def heads(tensors, config, *names):
    """Split tensors into heads: {name: [heads, H, D]}."""
    return [tensors[name].view(-1, config.head_size, config.hidden_size) for name in names]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_qkv_goes_by_group(tp_size):
    config = preset("tiny-glm")  # 8 heads in 2 groups
    tensors = random_tensors(config, "linear_qkv.weight")
    query, key, value = heads(tensors, config, *tensors)
    groups = [torch.cat((query[4 * g : 4 * g + 4], key[g : g + 1], value[g : g + 1])) for g in range(2)]
    for rank in range(tp_size):
        own = groups if tp_size == 1 else [groups[rank]]
        result = read(config, "linear_qkv.weight", tensors, rank, tp_size)
        assert torch.equal(result["self_attention.linear_qkv.weight"], torch.cat(own).flatten(0, 1))


@pytest.mark.parametrize("tp_size", [4, 8])
def test_more_ranks_than_groups_share_the_key_and_value_head(tp_size):
    config = preset("tiny-glm")
    tensors = random_tensors(config, "linear_qkv.weight")
    query, key, value = heads(tensors, config, *tensors)
    per_rank = 8 // tp_size
    for rank in range(tp_size):
        result = read(config, "linear_qkv.weight", tensors, rank, tp_size)
        group = rank * 2 // tp_size
        own = query[rank * per_rank : (rank + 1) * per_rank].flatten(0, 1)
        assert torch.equal(result["self_attention.linear_q.weight"], own)
        assert torch.equal(result["self_attention.linear_kv.weight"], torch.cat((key[group], value[group])))


def test_the_joined_qkv_of_chatglm_is_all_queries_then_keys_then_values():
    config = preset("tiny-glm")
    tensors = random_tensors(config, "linear_qkv.bias")
    legacy = replace(config, family="chatglm")
    joined = random_tensors(legacy, "linear_qkv.bias")
    joined = dict.fromkeys(joined, torch.cat(list(tensors.values())))
    for tp_size in (1, 2, 4):
        for rank in range(tp_size):
            apart = read(config, "linear_qkv.bias", tensors, rank, tp_size)
            together = read(legacy, "linear_qkv.bias", joined, rank, tp_size)
            assert apart.keys() == together.keys()
            assert all(torch.equal(apart[name], together[name]) for name in apart)


def test_gate_and_up_are_each_split():
    config = preset("tiny-glm")
    tensors = random_tensors(config, "linear_fc1.weight")
    (whole,) = tensors.values()
    gate, up = whole.chunk(2)
    result = read(config, "linear_fc1.weight", tensors, 1, 4)["mlp.linear_fc1.weight"]
    assert torch.equal(result, torch.cat((gate.chunk(4)[1], up.chunk(4)[1])))


@pytest.mark.parametrize("suffix", ["linear_proj.weight", "linear_fc2.weight"])
def test_row_parallel_weights_are_split_by_columns(suffix):
    config = preset("tiny-glm")
    tensors = random_tensors(config, suffix)
    (whole,) = tensors.values()
    for rank in range(4):
        (result,) = read(config, suffix, tensors, rank, 4).values()
        assert torch.equal(result, whole.chunk(4, dim=1)[rank])


@given(
    family=st.sampled_from(["chatglm", "glm", "glm4"]),
    kv_exponent=st.integers(0, 3),
    group_exponent=st.integers(0, 2),
    tp_exponent=st.integers(0, 4),
)
def test_pieces_cover_every_tensor_exactly_but_for_replicas(family, kv_exponent, group_exponent, tp_exponent):
    num_kv_heads, tp_size = 2**kv_exponent, 2**tp_exponent
    num_heads = num_kv_heads * 2**group_exponent
    config = replace(preset(f"tiny-{family}"), num_heads=num_heads, num_kv_heads=num_kv_heads)
    if num_heads % tp_size:
        with pytest.raises(ValueError, match=f"num_heads {num_heads} .* tp {tp_size}"):
            shards_of(weight_of(config, "linear_qkv.weight"), config, tp_rank=0, tp_size=tp_size)
        return
    for weight in weights_of(config, layers=[0]):
        pieces = set()
        for rank in range(tp_size):
            for shard in shards_of(weight, config, tp_rank=rank, tp_size=tp_size):
                pieces.update(shard.pieces)
        for name, shape in names_within(weight, config).items():
            spans = sorted((p.start, p.stop, p.dim) for p in pieces if p.name == name)
            assert len({dim for *_, dim in spans}) == 1
            starts = [start for start, *_ in spans]
            stops = [stop for _, stop, _ in spans]
            assert starts == [0, *stops[:-1]]
            assert stops[-1] == shape[spans[0][2]]


def test_an_impossible_split_names_the_numbers():
    config = preset("tiny-glm")
    weight = weight_of(config, "linear_qkv.weight")
    with pytest.raises(ValueError, match="tp_rank is 2; with tp 2"):
        shards_of(weight, config, tp_rank=2, tp_size=2)
    # 12 heads in 4 groups: six ranks share neither groups nor a group evenly
    odd = replace(config, num_heads=12, num_kv_heads=4, vocab_size=96)
    with pytest.raises(ValueError, match="num_kv_heads 4 of the model and tp 6"):
        shards_of(weight_of(odd, "linear_qkv.weight"), odd, tp_rank=0, tp_size=6)


def test_a_shard_of_another_shape_is_refused():
    config = preset("tiny-glm")
    (shard,) = shards_of(weight_of(config, "linear_fc2.weight"), config, tp_rank=0, tp_size=2)
    with pytest.raises(
        ValueError, match=r"linear_fc2.weight has the shape \[64, 96\], required is \[64, 48\]"
    ):
        place_shard(shard, torch.zeros(64, 96))
