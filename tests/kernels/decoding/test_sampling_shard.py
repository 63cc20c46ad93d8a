"""A sharded vocabulary gives the samples of the whole vocabulary."""

import itertools

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.decoding.sampling import sample
from glm_rlhf.kernels.decoding.sampling_shard import combine_shards, sample_shard
from glm_rlhf.kernels.decoding.top_k_top_p import truncation_threshold
from glm_rlhf.kernels.dispatch import launch

IMPLEMENTATIONS = ["reference", "triton"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bounds", [[500], [1, 6, 250], [127, 254, 381], [3]])
@pytest.mark.parametrize("is_truncated", [False, True])
def test_shards_of_any_size_draw_what_the_whole_draws(bounds, is_truncated, implementation):
    generator = torch.Generator().manual_seed(0)
    logits_BV = (2 * torch.randn(8, 509, generator=generator)).to(DEVICE)
    masked_V = (torch.rand(509, generator=generator) < 0.2).to(DEVICE)
    masked_V[:3] = True  # a shard without an allowed id
    arguments = {
        "seeds_B": torch.arange(8, device=DEVICE) * 31 - 9,
        "steps_B": torch.arange(8, device=DEVICE),
        "temperature_B": torch.linspace(0.0, 2.0, 8).to(DEVICE),
    }
    top_k_B = torch.full((8,), 12, dtype=torch.int32, device=DEVICE) if is_truncated else None
    with launch.forced(implementation):
        whole = sample(
            logits_BV,
            seeds_B=arguments["seeds_B"],
            steps_B=arguments["steps_B"],
            temperature=arguments["temperature_B"],
            top_k=top_k_B if is_truncated else 0,
            masked_ids_V=masked_V,
        )
        threshold_B = None
        if is_truncated:
            threshold_B = truncation_threshold(
                logits_BV, temperature_B=arguments["temperature_B"], top_k_B=top_k_B, masked_ids_V=masked_V
            )
        edges = [0, *bounds, 509]
        statistics = [
            sample_shard(
                logits_BV[:, low:high].contiguous(),
                **arguments,
                masked_ids_V=masked_V[low:high].contiguous(),
                threshold_B=threshold_B,
                vocab_offset=low,
            )
            for low, high in itertools.pairwise(edges)
        ]
        joined = combine_shards(torch.stack(statistics))
    assert torch.equal(joined.tokens_B, whole.tokens_B)
    # fp32 sums of 509 terms in another order.
    torch.testing.assert_close(joined.logprobs_B, whole.logprobs_B, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        joined.untempered_logprobs_B, whole.untempered_logprobs_B, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_maxima_on_two_shards_give_the_lowest_id(implementation):
    zeros_B = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    arguments = {"seeds_B": zeros_B, "steps_B": zeros_B, "temperature_B": zeros_B.float()}
    with launch.forced(implementation):
        statistics = [
            sample_shard(torch.tensor([shard], device=DEVICE), **arguments, vocab_offset=offset)
            for shard, offset in (([0.0, 4.0], 2), ([4.0, 4.0], 4), ([4.0, 1.0], 0))
        ]
        assert combine_shards(torch.stack(statistics)).tokens_B.tolist() == [0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_poisoned_shard_poisons_its_row_only(implementation):
    steps_B = torch.arange(2, device=DEVICE)
    arguments = {
        "seeds_B": torch.zeros_like(steps_B),
        "steps_B": steps_B,
        "temperature_B": torch.ones(2, device=DEVICE),
    }
    shards = list(torch.zeros(2, 2, 6, device=DEVICE))
    shards[1][0, 2] = torch.nan
    with launch.forced(implementation):
        statistics = [
            sample_shard(shard, **arguments, vocab_offset=6 * rank) for rank, shard in enumerate(shards)
        ]
        samples = combine_shards(torch.stack(statistics))
    assert samples.tokens_B[0] == -1
    assert 0 <= samples.tokens_B[1] < 12


def test_ids_beyond_fp32s_whole_numbers_are_refused():
    zeros = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="required are ids"):
        sample_shard(
            torch.zeros(1, 4),
            seeds_B=zeros,
            steps_B=zeros,
            temperature_B=torch.ones(1),
            vocab_offset=2**24 - 3,
        )
