"""The policy's logprobs before an update: the sampler's own, as long as a sample of them is shown right."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from glm_rlhf.engine.scoring.packed_batches import PackedBatch, batches_of_rollouts
from glm_rlhf.engine.scoring.rollout_scores import numbers_without, stream_logprobs
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.topology import Topology

_ONE_IN = 8  # sequences that are looked at


def old_logprobs(
    policy: Sequence[GLMModel],
    rollouts: Rollouts,
    mask_T: torch.Tensor,
    *,
    max_gap: float,
    max_tokens: int,
    seed: int,
    topology: Topology,
) -> tuple[torch.Tensor, float]:
    """Return the policy's logprobs, fp32 [T], and the sampler's mean distance from them in nats.

    A forward pass over a sample of the sequences tells the distance, over all data-parallel ranks; where it
    is above `max_gap`, the pass goes over the others too. The sampler's logprobs are those
    at temperature 1: at any other all are computed, and the distance is unknown (NaN).

    Every rank of the topology calls this, one without sequences too.

    Args:
        policy: this rank's chunks.
        rollouts: this data-parallel rank's.
        mask_T: whose logprobs are wanted, bool [T].
        max_gap: mean distance, in nats, up to which the sampler's logprobs are taken.
        max_tokens: of a micro-batch.
        seed: of the sample, another one each iteration.
        topology: layout and groups.
    """

    def scored(numbers: Sequence[int]) -> tuple[torch.Tensor, list[PackedBatch]]:
        streams = {"mask": mask_T}
        batches = batches_of_rollouts(
            rollouts, numbers, max_tokens=max_tokens, topology=topology, streams=streams
        )
        return stream_logprobs(policy, rollouts, batches, mask_T, topology=topology), batches

    if rollouts.temperature != 1.0:
        return scored(range(rollouts.num_sequences))[0], float("nan")
    sample = draw_sample(rollouts, max_tokens=max_tokens, seed=seed)
    found_T, batches = scored(sorted(sample))
    compared_T = torch.zeros_like(mask_T)
    for batch in batches:
        batch.put(batch.streams["mask"], compared_T)
    distance = ((found_T - rollouts.logprobs_T).abs() * compared_T).sum()
    sums = torch.stack((distance, compared_T.sum().float())).double()
    dist.all_reduce(sums, group=topology.dp_group)
    gap = (sums[0] / sums[1].clamp(min=1)).item()
    if gap <= max_gap:
        return rollouts.logprobs_T * mask_T, gap
    return found_T + scored(numbers_without(rollouts, sample))[0], gap


def draw_sample(rollouts: Rollouts, *, max_tokens: int, seed: int) -> frozenset[int]:
    """Return one in eight of the sequences, rounded up, by number from 0; fewer where they are long.

    Excluded ones are not in it. The sample has at most `max_tokens` tokens, one sequence apart, and is the
    same on all ranks that share the sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(rollouts.num_sequences, generator=generator).tolist()
    numbers = [number for number in numbers if number not in rollouts.excluded]
    sample, room = [], max_tokens
    for number in numbers[: -(-len(numbers) // _ONE_IN)]:
        room -= rollouts.lengths[number]
        if sample and room < 0:
            break
        sample.append(number)
    return frozenset(sample)
