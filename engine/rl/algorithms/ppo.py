"""PPO: the losses of policy and critic on an iteration's experience, cut in mini-batches.

Differs from the textbook in what ChatGLM-RLHF and the field add: dual-sided clipping of values in units of
reward, a next-token loss on demonstrations in the policy's steps, and one joint step of both roles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
import torch.distributed as dist

from glm_rlhf.engine.config.rl import PPOSection
from glm_rlhf.engine.scoring.packed_batches import PackedBatch, batches_of_rollouts
from glm_rlhf.engine.training.loss import Learner, Loss, LossTerm
from glm_rlhf.engine.training.step import RoleStep
from glm_rlhf.engine.types import Experience
from glm_rlhf.kernels import ppo_value_loss
from glm_rlhf.kernels.rl.reference_policy_loss import POLICY_SUMS, PolicyStatistics
from glm_rlhf.kernels.rl.reference_value_loss import VALUE_SUMS, ValueStatistics
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.token_outputs import next_tokens, shift_to_rows, token_values
from glm_rlhf.parallel.model.vocab_parallel_loss import linear_ppo_loss
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The clipped policy objective − entropy_coef · entropy, summed over action tokens / denominator.

    Streams: `mask` (bool), `old_logprobs`, `advantages` (fp32), all of tokens. See `kernels.rl.policy_loss`.
    """

    ppo: PPOSection
    """The algorithm's settings."""
    temperature: float
    """Of the rollouts."""
    sum_names: ClassVar[tuple[str, ...]] = POLICY_SUMS
    num_maxima: ClassVar[int] = 2

    def __call__(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, PolicyStatistics]:
        """Return this rank's part of the loss, and its statistics; see `Loss`."""
        shard = batch.shard(model.topology)
        mask_T = batch.streams["mask"]
        return linear_ppo_loss(
            hidden_TD,
            model.output_weight_VD,
            shard.take(next_tokens(batch.packed, mask_T)),
            shard.take(shift_to_rows(batch.streams["old_logprobs"])),
            shard.take(shift_to_rows(batch.streams["advantages"])),
            shard.take(shift_to_rows(mask_T)),
            group=model.topology.tp_group,
            clip_low=self.ppo.clip,
            clip_high=self.ppo.clip,
            entropy_coef=self.ppo.entropy_coef,
            temperature=self.temperature,
            denominator=denominator,
            reduces_hidden_gradient=not model.config.sequence_parallel,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """½ the squared error of values, clipped, summed over action tokens / denominator.

    Streams: `mask` (bool), `values`, `returns` (fp32), all of tokens. See `kernels.rl.value_loss`.
    """

    value_clip: float | None
    """The critic may move this far from its old value; None does not clip."""
    sum_names: ClassVar[tuple[str, ...]] = VALUE_SUMS
    num_maxima: ClassVar[int] = 0

    def __call__(
        self, model: GLMModel, hidden_TD: torch.Tensor, batch: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, ValueStatistics]:
        """Return this rank's part of the loss, and its statistics; see `Loss`."""
        shard = batch.shard(model.topology)
        return ppo_value_loss(
            token_values(model, hidden_TD),
            shard.take(shift_to_rows(batch.streams["values"])),
            shard.take(shift_to_rows(batch.streams["returns"])),
            shard.take(shift_to_rows(batch.streams["mask"])),
            value_clip=self.value_clip,
            denominator=denominator,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The sequences of one optimizer step on this rank."""

    batches: tuple[PackedBatch, ...]
    """Their micro-batches, with the streams of both losses; none where this rank has no sequence in the
    step."""
    num_actions: float
    """Trained tokens of the step over all data-parallel ranks: the losses' denominator."""


def mini_batches(
    experience: Experience, ppo: PPOSection, *, micro_batch_tokens: int, seed: int, topology: Topology
) -> list[MiniBatch]:
    """Return one epoch's mini-batches: all ranks' sequences in random order, cut in even parts.

    Which sequences form a mini-batch follows from the seed, not from the layout; a rank has those of its
    share. Every rank of the topology calls this: the data-parallel group sums the denominators.

    Args:
        experience: of this rank's share.
        ppo: the algorithm's settings.
        micro_batch_tokens: most tokens of a micro-batch.
        seed: of the order.
        topology: layout and groups.
    """
    rollouts = experience.rollouts
    generator = torch.Generator().manual_seed(seed)
    position = torch.randperm(rollouts.num_global, generator=generator).tolist()
    streams = {
        "mask": rollouts.action_mask_T,
        "old_logprobs": experience.old_logprobs_T,
        "advantages": experience.advantages_T,
        "values": experience.values_T,
        "returns": experience.returns_T,
    }
    parts, sizes = [], []
    for part in range(ppo.minibatches):
        batches = batches_of_rollouts(
            rollouts,
            [n for n, index in enumerate(rollouts.indices) if position[index] % ppo.minibatches == part],
            max_tokens=micro_batch_tokens,
            topology=topology,
            streams=streams,
        )
        parts.append(tuple(batches))
        sizes.append(sum(int(batch.streams["mask"].sum()) for batch in batches))
    totals = torch.tensor(sizes, dtype=torch.float64, device=topology.device)
    dist.all_reduce(totals, group=topology.dp_group)
    return [
        MiniBatch(batches=part, num_actions=max(total, 1.0))
        for part, total in zip(parts, totals.tolist(), strict=True)
    ]


def learners(
    states: Mapping[str, AnyTrainingState],
    experience: Experience,
    mini_batch: MiniBatch,
    ppo: PPOSection,
    *,
    demonstrations: LossTerm | None = None,
) -> dict[str, Learner]:
    """Return each role's part in an optimizer step, by role: the critic's, then the policy's.

    Both losses are divided by the action tokens of the mini-batch over all data-parallel ranks. The policy's
    has the loss on demonstrations as a second term: micro-batches of both go through one pipeline schedule
    into one gradient, which is reduced and clipped once.

    Args:
        states: `policy` and `critic` in training.
        experience: of this rank's share.
        mini_batch: of it.
        ppo: the algorithm's settings.
        demonstrations: the step's demonstrations; None for none.
    """
    rollouts = experience.rollouts

    def term(loss: Loss) -> LossTerm:
        return LossTerm(
            loss=loss,
            batches=mini_batch.batches,
            denominator=mini_batch.num_actions,
            name_items=rollouts.name_answers,
        )

    terms = {"critic": [term(ValueLoss(value_clip=ppo.value_clip))]}
    terms["policy"] = [term(PolicyLoss(ppo=ppo, temperature=rollouts.temperature))]
    if demonstrations is not None:
        terms["policy"].append(demonstrations)
    return {role: Learner(role=role, state=states[role], terms=tuple(own)) for role, own in terms.items()}


def policy_metrics(step: RoleStep) -> dict[str, float]:
    """Return the metrics of one step of the policy."""
    own, *demonstrations = step.terms
    statistics = PolicyStatistics(sums=own.sums, maxima=own.maxima)
    metrics = {
        "actor/pg_loss": float(statistics.policy_loss),
        "actor/ppo_kl": float(statistics.approximate_kl),
        "actor/pg_clipfrac": float(statistics.clip_fraction),
        "actor/entropy": float(statistics.entropy),
        "actor/ratio_max": float(statistics.ratio_max),
        "actor/ratio_min": float(statistics.ratio_min),
        "actor/grad_norm": float(step.grad_norm),
    }
    for term in demonstrations:
        metrics["actor/sft_loss"] = float(term.sums[0])
    return metrics


def critic_metrics(step: RoleStep) -> dict[str, float]:
    """Return the metrics of one step of the critic."""
    statistics = ValueStatistics(sums=step.terms[0].sums)
    return {
        "critic/vf_loss": float(statistics.value_loss),
        "critic/vf_clipfrac": float(statistics.clip_fraction),
        "critic/vf_explained_var": float(statistics.explained_variance),
        "critic/grad_norm": float(step.grad_norm),
    }


def policy_means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over an iteration's steps; extremes are over all."""
    if not steps:
        return {}
    metrics = {name: fmean(step[name] for step in steps) for name in steps[0]}
    metrics["actor/first_ppo_kl"] = steps[0]["actor/ppo_kl"]
    metrics["actor/ratio_max"] = max(step["actor/ratio_max"] for step in steps)
    metrics["actor/ratio_min"] = min(step["actor/ratio_min"] for step in steps)
    return metrics


def critic_means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over an iteration's steps; the explained variance is the last one's."""
    metrics = {name: fmean(step[name] for step in steps) for name in steps[0]}
    metrics["critic/vf_explained_var"] = steps[-1]["critic/vf_explained_var"]
    return metrics
