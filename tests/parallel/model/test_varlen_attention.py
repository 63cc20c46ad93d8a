"""Attention over packed sequences equals softmax attention per sequence, and fast paths get its arguments."""

import inspect
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_rlhf.parallel.model import varlen_attention
from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.model.varlen_attention import implementation_name, packed_attention


def heads(num_tokens, num_heads, dtype=torch.float64, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_heads, size, generator=generator, dtype=torch.float64).to(dtype)


def definition(query_TNH, key_TKH, value_TKH, spans):
    """Causal softmax attention within each span, query heads in groups over key/value heads."""
    group = query_TNH.shape[1] // key_TKH.shape[1]
    key_TNH, value_TNH = (t.repeat_interleave(group, dim=1) for t in (key_TKH, value_TKH))
    output = torch.zeros_like(query_TNH)
    for start, end in spans:
        for t in range(start, end):
            score_NS = torch.einsum("nh,snh->ns", query_TNH[t], key_TNH[start : t + 1])
            weight_NS = (score_NS / query_TNH.shape[2] ** 0.5).softmax(-1)
            output[t] = torch.einsum("ns,snh->nh", weight_NS, value_TNH[start : t + 1])
    return output


def packed_of(lengths, multiple=1):
    return pack([torch.arange(length) for length in lengths], multiple=multiple)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([(4, 1), (4, 2), (2, 2)]),
)
def test_every_share_of_a_stream_equals_the_definition(lengths, cp_size, num_heads):
    if not sum(lengths):
        return
    packed = packed_of(lengths, multiple=2 * cp_size)
    queries, groups = num_heads
    query, key, value = (heads(packed.num_tokens, n, seed=i) for i, n in enumerate((queries, groups, groups)))
    expected = definition(query, key, value, packed.spans)
    for rank in range(cp_size):
        mine = share(packed, cp_rank=rank, cp_size=cp_size)
        found = packed_attention(mine.take(query), key, value, mine.segments)
        # float64 sums of some ten terms.
        assert (found - mine.take(expected)).abs().max() <= 1e-12


@pytest.mark.parametrize("cp_size", [1, 2])
def test_gradients_equal_the_definitions(cp_size):
    packed = packed_of([1, 11, 0, 5, 1], multiple=4)
    inputs = [heads(packed.num_tokens, n, seed=n).requires_grad_() for n in (4, 2, 1)]
    query, key, value = inputs[0], inputs[1], inputs[2].expand(-1, 2, -1)
    upstream = heads(packed.num_tokens, 4, seed=9)
    wanted = torch.autograd.grad((definition(query, key, value, packed.spans) * upstream).sum(), inputs)
    found = [torch.zeros_like(tensor) for tensor in inputs]
    for rank in range(cp_size):
        mine = share(packed, cp_rank=rank, cp_size=cp_size)
        output = packed_attention(mine.take(query), key, value, mine.segments)
        parts = torch.autograd.grad((output * mine.take(upstream)).sum(), inputs, retain_graph=True)
        found = [a + b for a, b in zip(found, parts, strict=True)]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-12  # float64


def test_bf16_on_a_cpu_keeps_its_type_and_rounds_once_or_twice():
    packed = packed_of([3, 20, 1])
    query, key, value = (heads(24, n, torch.bfloat16, seed=n) for n in (8, 2, 2))
    found = packed_attention(query, key, value, share(packed).segments)
    assert found.dtype == torch.bfloat16
    expected = definition(query.double(), key.double(), value.double(), packed.spans)
    # Values up to 4: bf16 rounds to 1/64 there; softmax weights are rounded once before they multiply.
    assert (found.double() - expected).abs().max() <= 0.04


@pytest.fixture
def fresh_choice(monkeypatch):
    """Clears the cached implementation, before and after."""
    caches = [member for member in vars(varlen_attention).values() if hasattr(member, "cache_clear")]
    assert len(caches) == 4
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def calls_of_varlen(monkeypatch, function):
    """Install `function` as torch's varlen_attn, and attend as on CUDA."""
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = function
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert implementation_name("cuda", torch.bfloat16) == "torch_varlen"
    packed = packed_of([5, 1, 6], multiple=4)
    mine = share(packed, cp_rank=1, cp_size=2)
    query, key, value = (heads(12, n, seed=n) for n in (4, 2, 2))
    attend = varlen_attention._implementation("cuda", torch.bfloat16)
    parts = [
        attend(
            mine.take(query)[s.query_start : s.query_end],
            key[s.key_start : s.key_end],
            value[s.key_start : s.key_end],
            s,
        )
        for s in mine.segments
    ]
    return torch.cat(parts), mine.take(definition(query, key, value, packed.spans))


def bottom_right_causal(query, key, value, cu_seq_q, cu_seq_k):
    """The definition of a variable-length kernel: the last query of each sequence sees its last key."""
    output = torch.zeros_like(query)
    for i in range(len(cu_seq_q) - 1):
        (a, b), (c, d) = cu_seq_q[i : i + 2].tolist(), cu_seq_k[i : i + 2].tolist()
        whole = torch.zeros(d - c, *query.shape[1:], dtype=query.dtype)
        whole[d - c - (b - a) :] = query[a:b]
        output[a:b] = definition(whole, key[c:d], value[c:d], [(0, d - c)])[d - c - (b - a) :]
    return output


def test_torch_2_10_is_asked_for_causality_by_its_name(fresh_choice):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert is_causal
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        return bottom_right_causal(query, key, value, cu_seq_q, cu_seq_k)

    found, expected = calls_of_varlen(fresh_choice, varlen_attn)
    assert (found - expected).abs().max() <= 1e-12  # float64


def test_later_torch_is_asked_for_a_causal_window_and_grouped_heads(fresh_choice):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
    ):
        assert window_size == (-1, 0)
        assert enable_gqa
        return bottom_right_causal(query, key, value, cu_seq_q, cu_seq_k)

    found, expected = calls_of_varlen(fresh_choice, varlen_attn)
    assert (found - expected).abs().max() <= 1e-12  # float64


def test_transformer_engine_is_asked_for_packed_causal_attention(fresh_choice):
    class DotProductAttention:
        def __init__(self, num_heads, size, *, num_gqa_groups, attention_dropout, softmax_scale, **options):
            assert (num_heads, size, num_gqa_groups, attention_dropout) == (4, 8, 2, 0.0)
            assert softmax_scale == pytest.approx(8**-0.5)

        def __call__(self, query, key, value, *, cu_seqlens_q, cu_seqlens_kv, **options):
            assert options["qkv_format"] == "thd"
            assert options["attn_mask_type"] == "padding_causal_bottom_right"
            assert options["max_seqlen_q"] == int(cu_seqlens_q.diff().max())
            assert options["max_seqlen_kv"] == int(cu_seqlens_kv.diff().max())
            assert all(tensor.is_contiguous() for tensor in (query, key, value))
            return bottom_right_causal(query, key, value, cu_seqlens_q, cu_seqlens_kv).flatten(1)

    module = types.ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = DotProductAttention
    fresh_choice.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    fresh_choice.setitem(sys.modules, "transformer_engine.pytorch", module)
    assert implementation_name("cuda", torch.float16) == "transformer_engine"
    packed = packed_of([5, 1, 6])
    query, mixed = heads(12, 4), heads(12, 4, seed=1)
    key, value = mixed.split(2, dim=1)  # views, as the joint projection gives them
    (segment,) = share(packed).segments
    found = varlen_attention._implementation("cuda", torch.float16)(query, key, value, segment)
    assert (found - definition(query, key, value, packed.spans)).abs().max() <= 1e-12  # float64


def test_fp32_and_cpus_take_the_exact_path(fresh_choice):
    for kind, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float32)):
        assert implementation_name(kind, dtype) == "scaled_dot_product"
    fresh_choice.setitem(sys.modules, "torch.nn.attention.varlen", None)
    fresh_choice.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert implementation_name("cuda", torch.bfloat16) == "scaled_dot_product"


def test_the_installed_torch_takes_the_call():
    attend = varlen_attention._varlen_attention()
    if attend is None:
        pytest.skip("this torch has no variable-length attention")
    inspect.signature(attend).bind("query", "key", "value", "cu_seq_q", "cu_seq_k", 1, 1)
