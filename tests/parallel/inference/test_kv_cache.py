"""Pages of keys and values: as many as fit a budget, copied in every layer, freed with their owner."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_training import CONFIG, Case, make_chunks

from glm_rlhf.parallel.inference.kv_cache import KVCache, num_pages_within
from glm_rlhf.parallel.inference.weight_views import chunk_weights
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

# CONFIG: 4 layers, 2 key/value heads of 8. A page of 4 positions, fp32: 2 · 4 · 4 · 2 · 8 · 4 bytes.
PAGE_BYTES = 2048


@pytest.mark.parametrize(
    "axes, page_bytes",
    [
        ({}, PAGE_BYTES),
        ({"tp": 2}, PAGE_BYTES // 2),
        ({"tp": 4}, PAGE_BYTES // 2),  # one head per rank, each on two ranks
        ({"pp": 4}, PAGE_BYTES // 4),
        ({"tp": 2, "pp": 2, "vpp": 2}, PAGE_BYTES // 4),
    ],
)
@pytest.mark.parametrize("budget", [7, 7.99])
def test_a_budget_holds_whole_pages(axes, page_bytes, budget):
    options = {"page_size": 4, "dtype": torch.float32}
    budget_bytes = int(budget * page_bytes)
    assert num_pages_within(budget_bytes, CONFIG, Layout(**axes), **options) == 7
    options["dtype"] = torch.bfloat16
    assert num_pages_within(budget_bytes, CONFIG, Layout(**axes), **options) == int(2 * budget)


def test_a_budget_without_room_for_a_page_is_refused():
    options = {"page_size": 4, "dtype": torch.float32}
    assert num_pages_within(PAGE_BYTES, CONFIG, Layout(), **options) == 1
    with pytest.raises(ValueError, match=r"a cache of 2047 bytes holds no page: one takes 2048 bytes"):
        num_pages_within(PAGE_BYTES - 1, CONFIG, Layout(), **options)


def caches(axes):
    """On each rank: bytes of a cache of 7 pages, those that torch holds for it, and shapes of its pools."""
    with open_topology(Layout(**axes)) as topology:
        chunks = chunk_weights(make_chunks(Case(), topology))
        cache = KVCache(chunks, num_pages=7, page_size=4)
        num_layers = sum(len(chunk.layers) for chunk in chunks)
        pools = [pool for index in range(num_layers) for pool in cache.layer(index)]
        assert all(pool.is_contiguous() for pool in pools), "the kernels need them so"
        held = {pool.untyped_storage().data_ptr(): pool.untyped_storage().nbytes() for pool in pools}
        return cache.num_bytes, sum(held.values()), {tuple(pool.shape) for pool in pools}


@pytest.mark.parametrize(
    "axes, layers, heads",
    [({"tp": 4}, 4, 1), ({"tp": 2, "pp": 2, "vpp": 2}, 2, 1), ({"pp": 4}, 1, 2)],
)
def test_a_cache_takes_what_its_pages_take(ranks, axes, layers, heads):
    page_bytes = 2 * layers * 4 * heads * 8 * 4
    for num_bytes, held, shapes in ranks.run(caches, axes):
        assert num_bytes == held == 7 * page_bytes
        assert num_pages_within(held, CONFIG, Layout(**axes), page_size=4, dtype=torch.float32) == 7
        assert shapes == {(7, 4, heads, 8)}


@pytest.fixture
def weights():
    with open_topology(Layout()) as topology:
        yield chunk_weights(make_chunks(Case(), topology))


def test_pages_are_copied_in_every_layer(weights):
    cache = KVCache(weights, num_pages=5, page_size=4)
    cache._pools.normal_()
    before = cache._pools.clone()
    cache.copy_pages([(0, 3), (0, 4), (2, 1)])
    for index in range(4):
        for old, new in zip(before[index], cache.layer(index), strict=True):
            assert torch.equal(new, old[[0, 2, 2, 0, 0]])
    cache.copy_pages([])


@pytest.mark.parametrize("changed", [{"num_pages": 0}, {"page_size": 0}])
def test_a_cache_has_pages(weights, changed):
    with pytest.raises(ValueError, match=f"{next(iter(changed))} is 0"):
        KVCache(weights, **({"num_pages": 2, "page_size": 4} | changed))


def test_the_memory_goes_with_the_cache(weights):
    cache = KVCache(weights, num_pages=3, page_size=4)
    storage = weakref.ref(cache._pools)
    pools = cache.layer(1)
    del cache
    assert storage() is not None, "a view keeps it"
    del pools
    gc.collect()
    assert storage() is None


def test_key_value_heads_fewer_than_ranks_are_counted_once_a_rank():
    one_head = replace(CONFIG, num_kv_heads=1)
    options = {"page_size": 4, "dtype": torch.float32}
    assert num_pages_within(PAGE_BYTES // 2, one_head, Layout(tp=4), **options) == 1
    assert num_pages_within(PAGE_BYTES // 2, one_head, Layout(), **options) == 1
