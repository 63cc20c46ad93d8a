"""PPO: GAE with the KL to the reference in the rewards, and the clipped losses of policy and critic.

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
from glm_rlhf.engine.rl.algorithm import Needs
from glm_rlhf.engine.scoring.packed_batches import PackedBatch, Streams
from glm_rlhf.engine.training.loss import Loss
from glm_rlhf.engine.training.step import RoleStep
from glm_rlhf.engine.types import Advantages, Experience, Rollouts, Signals
from glm_rlhf.kernels import ppo_advantages, ppo_value_loss, whiten
from glm_rlhf.kernels.rl.reference_policy_loss import POLICY_SUMS, PolicyStatistics
from glm_rlhf.kernels.rl.reference_value_loss import VALUE_SUMS, ValueStatistics
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.token_outputs import next_tokens, shift_to_rows, token_values
from glm_rlhf.parallel.model.vocab_parallel_loss import linear_ppo_loss
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


class PPO:
    """Owns the KL coefficient of PPO, which may follow a target."""

    def __init__(self, section: PPOSection) -> None:
        """Begin with the coefficient of the settings."""
        self.section, self.kl_coef = section, section.kl_coef

    def needs(self) -> Needs:
        """Return policy, critic and reference."""
        return Needs(trains=("critic", "policy"), reference=True)

    def advantages(self, rollouts: Rollouts, signals: Signals, *, topology: Topology) -> Advantages:
        """Return GAE of the critic's values, with the KL to the reference in the rewards; see `Algorithm`."""
        assert signals.ref_logprobs_T is not None
        assert signals.values_T is not None
        ppo, mask_T = self.section, rollouts.action_mask_T
        estimate = ppo_advantages(
            signals.old_logprobs_T,
            signals.ref_logprobs_T,
            signals.values_T,
            signals.rewards.rewards_B,
            rollouts.cu_seqlens,
            mask_T,
            kl_coef=self.kl_coef,
            gamma=ppo.gamma,
            lam=ppo.lam,
            kl_estimator=ppo.kl_estimator,
            token_rewards_T=signals.rewards.token_rewards_T,
        )
        advantages_T = estimate.advantages_T
        if ppo.whiten:
            sums = estimate.whitening_sums()
            dist.all_reduce(sums, group=topology.dp_group)
            advantages_T = whiten(advantages_T, mask_T, sums)
        return Advantages(advantages_T=advantages_T, returns_T=estimate.returns_T, kl_T=estimate.kl_T)

    def streams(self, experience: Experience) -> Streams:
        """Return the streams of `PolicyLoss` and `ValueLoss`."""
        assert experience.values_T is not None
        assert experience.returns_T is not None
        return {
            "mask": experience.rollouts.action_mask_T,
            "old_logprobs": experience.old_logprobs_T,
            "advantages": experience.advantages_T,
            "values": experience.values_T,
            "returns": experience.returns_T,
        }

    def losses(self, experience: Experience) -> Mapping[str, Loss]:
        """Return the losses of critic and policy."""
        return {
            "critic": ValueLoss(value_clip=self.section.value_clip),
            "policy": PolicyLoss(ppo=self.section, temperature=experience.rollouts.temperature),
        }

    def step_metrics(self, role: str, step: RoleStep) -> dict[str, float]:
        """Return the metrics of a step of critic or policy."""
        return critic_metrics(step) if role == "critic" else policy_metrics(step)

    def means(self, role: str, steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return means over the steps of critic or policy."""
        return critic_means(steps) if role == "critic" else policy_means(steps)

    def after_iteration(self, experience: Experience) -> dict[str, float]:
        """Move the KL coefficient towards its target, at most by a fifth of the way of one horizon."""
        metrics, target = {"actor/kl_coef": self.kl_coef}, self.section.kl_target
        if target is not None:
            error = experience.metrics["objective/kl_per_token"] / target - 1.0
            share = experience.rollouts.num_global / self.section.kl_horizon
            self.kl_coef *= 1.0 + min(max(error, -0.2), 0.2) * share
        return metrics

    def state(self) -> dict[str, float]:
        """Return the KL coefficient."""
        return {"kl_coef": self.kl_coef}

    def set_state(self, state: Mapping[str, float]) -> None:
        """Continue with a KL coefficient."""
        self.kl_coef = state["kl_coef"]


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
