"""From rollouts to experience: rewards, logprobs and values, then advantages in one launch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.rl.algorithm import Algorithm
from glm_rlhf.engine.scoring.old_logprobs import old_logprobs
from glm_rlhf.engine.scoring.overlapped_scores import OverlappedScores
from glm_rlhf.engine.scoring.packed_batches import batches_of_rollouts
from glm_rlhf.engine.scoring.rollout_scores import numbers_without, stream_logprobs, stream_rows
from glm_rlhf.engine.types import Experience, Rewards, Rollouts, Signals
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.token_outputs import shift_to_tokens
from glm_rlhf.parallel.runtime.nonfinite import abbreviate, raise_if_nonfinite
from glm_rlhf.parallel.runtime.topology import Topology

Rewarder = Callable[[Rollouts], Rewards]
"""Gives the rewards of this rank's sequences less their baselines; every rank calls it."""


def make_experience(
    rollouts: Rollouts,
    *,
    models: Mapping[str, Sequence[GLMModel]],
    rewarder: Rewarder,
    algorithm: Algorithm,
    micro_batch_tokens: int,
    sample_seed: int,
    topology: Topology,
    overlapped: Mapping[str, OverlappedScores] | None = None,
) -> Experience:
    """Return what an update needs of these rollouts; every rank of the topology calls this.

    The policy's logprobs are the sampler's own where a forward pass over a sample of the sequences shows that
    they are the same, at temperature 1; else the pass goes over all of them.

    Args:
        rollouts: this data-parallel rank's.
        models: this rank's chunks by role: policy, reference, critic.
        rewarder: gives the rewards.
        algorithm: gives the advantages; what it does not need is not computed.
        micro_batch_tokens: most tokens of a micro-batch.
        sample_seed: of that sample.
        topology: layout and groups.
        overlapped: scores of some answers, by role, computed while others were generated.

    Raises:
        FloatingPointError: a reward, logprob or value is not finite; the message, the same on every rank,
            names the role, the ranks and the answers.
    """
    overlapped = overlapped or {}
    phases = Phases()
    with phases.phase("reward"):
        rewards = rewarder(rollouts)
    rollouts = replace(rollouts, excluded=rewards.excluded)
    mask_T = rollouts.action_mask_T
    rewards_B = rewards.totals_B(rollouts.starts)
    needs = algorithm.needs()
    ref_logprobs_T = values_T = None
    if needs.reference:
        with phases.phase("reference"):
            known = overlapped.get("reference")
            batches = batches_of_rollouts(
                rollouts,
                numbers_without(rollouts, known.sequences if known else frozenset()),
                max_tokens=micro_batch_tokens,
                topology=topology,
                streams={"mask": mask_T},
            )
            ref_logprobs_T = stream_logprobs(
                models["reference"], rollouts, batches, mask_T, topology=topology, overlapped=known
            )
    with phases.phase("old_logprobs"):
        old_logprobs_T, gap = old_logprobs(
            models["policy"],
            rollouts,
            mask_T,
            max_tokens=micro_batch_tokens,
            topology=topology,
            max_gap=algorithm.section.max_logprob_gap,
            seed=sample_seed,
        )
    if "critic" in needs.trains:
        with phases.phase("values"):
            rows_T = stream_rows(
                models["critic"],
                rollouts,
                max_tokens=micro_batch_tokens,
                topology=topology,
                overlapped=overlapped.get("critic"),
            )
            values_T = shift_to_tokens(rows_T) * mask_T
    found = {
        "the rewards": rewards_B.repeat_interleave(torch.tensor(rollouts.lengths, device=rewards_B.device)),
        "the reference's logprobs": ref_logprobs_T,
        "the policy's logprobs": old_logprobs_T,
        "the critic's values": values_T,
    }
    _check_finite(found, rollouts, topology)
    signals = Signals(
        rewards=rewards,
        old_logprobs_T=old_logprobs_T,
        ref_logprobs_T=ref_logprobs_T,
        values_T=values_T,
    )
    with phases.phase("estimate"):
        made = algorithm.advantages(rollouts, signals, topology=topology)
    return Experience(
        rollouts=rollouts,
        rewards_B=rewards_B,
        old_logprobs_T=old_logprobs_T,
        ref_logprobs_T=ref_logprobs_T,
        values_T=values_T,
        advantages_T=made.advantages_T,
        returns_T=made.returns_T,
        kl_T=made.kl_T,
        metrics=_metrics(rollouts, rewards_B, made.kl_T, values_T, mask_T, gap, topology) | phases.seconds,
    )


def _check_finite(found: dict[str, torch.Tensor | None], rollouts: Rollouts, topology: Topology) -> None:
    """Stop all ranks together where one has a number that is none."""
    findings = []
    for name, values_T in found.items():
        answers = [] if values_T is None else answers_with(rollouts, ~values_T.isfinite())
        if answers:
            findings.append(f"{name} of answers {abbreviate(answers)}")
    raise_if_nonfinite(findings, "no update is made of them", device=topology.device)


def answers_with(rollouts: Rollouts, chosen_T: torch.Tensor) -> list[int]:
    """Return which answers, by their place among those of all ranks, have a chosen token; bool [T]."""
    pieces = chosen_T.split(list(rollouts.lengths))
    return [index for index, piece in zip(rollouts.indices, pieces, strict=True) if bool(piece.any())]


def _metrics(
    rollouts: Rollouts,
    rewards_B: torch.Tensor,
    kl_T: torch.Tensor | None,
    values_T: torch.Tensor | None,
    mask_T: torch.Tensor,
    gap: float,
    topology: Topology,
) -> dict[str, float]:
    """Return means over the sequences and tokens of all data-parallel ranks; excluded ones count for
    the lengths only."""
    lengths = [
        length - prompt for length, prompt in zip(rollouts.lengths, rollouts.prompt_lengths, strict=True)
    ]
    zero = torch.zeros((), device=mask_T.device)
    num_cut = sum(not is_finished for is_finished in rollouts.is_finished)
    sums = torch.stack(
        [
            torch.tensor(float(rollouts.num_sequences), device=mask_T.device),
            rewards_B.sum(),
            rewards_B.square().sum(),
            torch.tensor(float(sum(lengths)), device=mask_T.device),
            torch.tensor(float(num_cut), device=mask_T.device),
            mask_T.sum().float(),
            zero if kl_T is None else (kl_T * mask_T).sum(),
            zero if values_T is None else values_T.sum(),
            torch.tensor(float(sum(rollouts.prompt_lengths)), device=mask_T.device),
            torch.tensor(float(len(rollouts.excluded)), device=mask_T.device),
        ]
    ).double()
    dist.all_reduce(sums, group=topology.dp_group)
    count, rewards, squares, length, cut, tokens, kl, values, prompt, excluded = sums.tolist()
    judged = max(count - excluded, 1)
    mean = rewards / judged
    metrics = {
        "reward/minus_baseline/mean": mean,
        "reward/minus_baseline/std": max(squares / judged - mean * mean, 0.0) ** 0.5,
        "reward/num_excluded": excluded,
        "prompt_length/mean": prompt / max(count, 1),
        "response_length/mean": length / max(count, 1),
        "response_length/cut_fraction": cut / max(count, 1),
        "rollout/logprob_gap": gap,
    }
    if values_T is not None:
        metrics["critic/values/mean"] = values / max(tokens, 1)
    if kl_T is not None:
        metrics |= {"objective/kl": kl / judged, "objective/kl_per_token": kl / max(tokens, 1)}
    return metrics
