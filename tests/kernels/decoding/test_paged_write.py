"""Writes to the paged pool: every listed slot gets its row, all others stay unchanged."""

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.decoding.paged_write import paged_write
from glm_rlhf.kernels.dispatch import launch

IMPLEMENTATIONS = ["reference", "triton"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "num_tokens, num_kv_heads, head_size", [(1, 1, 1), (3, 2, 63), (101, 3, 16), (0, 2, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_the_slots_named_and_nothing_else(num_tokens, num_kv_heads, head_size, dtype, implementation):
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, num_tokens, num_kv_heads, head_size, generator=generator).to(dtype)
    pools = torch.randn(2, 12, 16, num_kv_heads, head_size, generator=generator).to(dtype)
    slots = torch.randperm(12 * 16, generator=generator)[:num_tokens]
    slots[::3] = -1
    expected = pools.clone().view(2, 12 * 16, num_kv_heads, head_size)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0, slot], expected[1, slot] = key[token], value[token]
    key, value, pools, slots = (tensor.to(DEVICE) for tensor in (key, value, pools, slots))
    with launch.forced(implementation):
        paged_write(key, value, pools[0], pools[1], slots)
    assert torch.equal(pools.cpu().view_as(expected), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_takes_views_into_packed_qkv(implementation):
    mixed_TGSH = torch.randn(5, 2, 6, 8).to(DEVICE)
    pools = torch.zeros(2, 2, 4, 2, 8, device=DEVICE)
    slots = torch.tensor([7, 0, 1, 2, 4], device=DEVICE)
    with launch.forced(implementation):
        paged_write(mixed_TGSH[:, :, 4], mixed_TGSH[:, :, 5], pools[0], pools[1], slots)
    assert torch.equal(pools[0].view(8, 2, 8)[slots], mixed_TGSH[:, :, 4])
    assert torch.equal(pools[1].view(8, 2, 8)[slots], mixed_TGSH[:, :, 5])
    assert not pools.view(2, 8, 2, 8)[:, [3, 5, 6]].any()


def test_a_slot_past_the_pool_is_an_error_on_cpu():
    pools = torch.zeros(2, 2, 4, 1, 8)
    with pytest.raises(IndexError):
        paged_write(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), pools[0], pools[1], torch.tensor([8]))


def test_wrong_arguments_are_named():
    key, pool, slots = torch.zeros(3, 2, 8), torch.zeros(2, 4, 2, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="with key's K and H"):
        paged_write(key, key, pool[..., :4].contiguous(), pool[..., :4].contiguous(), slots)
    with pytest.raises(ValueError, match=r"int64 \[3\]"):
        paged_write(key, key, pool, pool, slots.int())
    with pytest.raises(ValueError, match="use one dtype"):
        paged_write(key.bfloat16(), key.bfloat16(), pool, pool, slots)
    with pytest.raises(ValueError, match="contiguous"):
        paged_write(key, key, pool.transpose(0, 1), pool.transpose(0, 1), slots)
