"""What policy and critic learn from one mini-batch of an iteration."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from glm_rlhf.engine.rl.optimizer_step import Learner
from glm_rlhf.engine.rl.ppo_settings import PPOSettings
from glm_rlhf.engine.rl.sft_term import SFTTerm
from glm_rlhf.engine.scoring.record_batches import MicroBatch
from glm_rlhf.engine.scoring.rollout_batches import StreamBatch, stream_batches
from glm_rlhf.engine.types import Experience
from glm_rlhf.kernels import ppo_value_loss
from glm_rlhf.kernels.rl.reference_policy_loss import POLICY_SUMS, PolicyStatistics
from glm_rlhf.kernels.rl.reference_value_loss import VALUE_SUMS, ValueStatistics
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import PackedTokens, share
from glm_rlhf.parallel.model.token_outputs import next_tokens, shift_to_rows, token_values
from glm_rlhf.parallel.model.vocab_parallel_loss import linear_ppo_loss
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.optim.training_state import StepResult
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The sequences of one optimizer step on this rank."""

    batches: tuple[StreamBatch, ...]
    """Their micro-batches; none where this rank has no sequence in the step."""
    num_actions: float
    """Trained tokens of the step over all data-parallel ranks: the losses' denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStep:
    """What became of one optimizer step of the policy, over all ranks."""

    result: StepResult
    """Of the optimizer."""
    statistics: PolicyStatistics
    """Of the policy's own loss."""
    sft_loss: float | None
    """Loss on the step's demonstrations, in nats a token, without its weight; None without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticStep:
    """What became of one optimizer step of the critic, over all ranks."""

    result: StepResult
    """Of the optimizer."""
    statistics: ValueStatistics
    """Of its loss."""


def mini_batches(
    experience: Experience, settings: PPOSettings, *, seed: int, topology: Topology
) -> list[MiniBatch]:
    """Return one epoch's mini-batches: all ranks' sequences in random order, cut in even parts.

    Which sequences form a mini-batch follows from the seed, not from the layout; a rank has those of its
    share. Every rank of the topology calls this: the data-parallel group sums the denominators.
    """
    rollouts = experience.rollouts
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randperm(rollouts.num_global, generator=generator).tolist()
    mask_T = rollouts.action_mask_T
    parts, sizes = [], []
    for part in range(settings.minibatches):
        batches = stream_batches(
            rollouts.tokens_T,
            rollouts.lengths,
            max_tokens=settings.micro_batch_tokens,
            multiple=topology.layout.token_multiple,
            indices=[
                place
                for place, index in enumerate(rollouts.indices)
                if turn[index] % settings.minibatches == part
            ],
        )
        parts.append(tuple(batches))
        sizes.append(sum(int(batch.take(mask_T).sum()) for batch in batches))
    totals = torch.tensor(sizes, dtype=torch.float64, device=topology.device)
    dist.all_reduce(totals, group=topology.dp_group)
    return [
        MiniBatch(batches=part, num_actions=max(total, 1.0))
        for part, total in zip(parts, totals.tolist(), strict=True)
    ]


def policy_learner(
    state: AnyTrainingState,
    experience: Experience,
    mini_batch: MiniBatch,
    settings: PPOSettings,
    *,
    topology: Topology,
    sft: SFTTerm | None = None,
) -> Learner[PolicyStep]:
    """Return the policy's part in an optimizer step, which ends in what it did over all ranks.

    Loss: Σ over action tokens of the clipped objective - entropy_coef · entropy, divided by the action
    tokens of the mini-batch over all data-parallel ranks; plus, with `sft`, coef · Σ over answer tokens of
    the step's demonstrations of -log p, divided by these tokens over all data-parallel ranks. Micro-batches
    of both go through one pipeline schedule into one gradient, which is reduced and clipped once.
    """
    mask_T = experience.rollouts.action_mask_T

    def loss(
        model: GLMModel, hidden_TD: torch.Tensor, batch: StreamBatch | MicroBatch
    ) -> tuple[torch.Tensor, PolicyStatistics | torch.Tensor]:
        if isinstance(batch, MicroBatch):
            return sft.loss(model, hidden_TD, batch)
        rows = _RowsOf(batch, topology)
        return linear_ppo_loss(
            hidden_TD,
            model.output_weight_VD,
            rows.own(next_tokens(batch.packed, batch.take(mask_T))),
            rows(experience.old_logprobs_T),
            rows(experience.advantages_T),
            rows(mask_T),
            group=topology.tp_group,
            clip_low=settings.clip,
            clip_high=settings.clip,
            entropy_coef=settings.entropy_coef,
            temperature=experience.rollouts.temperature,
            denominator=mini_batch.num_actions,
            reduces_hidden_gradient=not model.config.sequence_parallel,
        )

    def reduce_statistics(result: StepResult, found: Sequence[PolicyStatistics | torch.Tensor]) -> PolicyStep:
        own = [one for one in found if isinstance(one, PolicyStatistics)]
        sums = _summed([one.sums for one in own], len(POLICY_SUMS), topology)
        maxima = _largest([one.maxima for one in own], topology)
        sft_loss = None
        if sft is not None:
            demonstrated = [one for one in found if isinstance(one, torch.Tensor)]
            sft_loss = _summed(demonstrated, len(sft.objective.sum_names), topology)[0].item()
        statistics = PolicyStatistics(sums=sums, maxima=maxima)
        return PolicyStep(result=result, statistics=statistics, sft_loss=sft_loss)

    given = (*mini_batch.batches, *(sft.batches if sft is not None else ()))
    return Learner(role="policy", state=state, batches=given, loss=loss, reduce_statistics=reduce_statistics)


def critic_learner(
    state: AnyTrainingState,
    experience: Experience,
    mini_batch: MiniBatch,
    settings: PPOSettings,
    *,
    topology: Topology,
) -> Learner[CriticStep]:
    """Return the critic's part in an optimizer step, which ends in what it did over all ranks.

    Loss: Σ over action tokens of ½ the squared error, clipped, divided as the policy's.
    """
    mask_T = experience.rollouts.action_mask_T

    def loss(
        model: GLMModel, hidden_TD: torch.Tensor, batch: StreamBatch
    ) -> tuple[torch.Tensor, ValueStatistics]:
        rows = _RowsOf(batch, topology)
        return ppo_value_loss(
            token_values(model, hidden_TD),
            rows(experience.values_T),
            rows(experience.returns_T),
            rows(mask_T),
            value_clip=settings.value_clip,
            denominator=mini_batch.num_actions,
        )

    def reduce_statistics(result: StepResult, found: Sequence[ValueStatistics]) -> CriticStep:
        sums = _summed([one.sums for one in found], len(VALUE_SUMS), topology)
        return CriticStep(result=result, statistics=ValueStatistics(sums=sums))

    return Learner(
        role="critic", state=state, batches=mini_batch.batches, loss=loss, reduce_statistics=reduce_statistics
    )


class _RowsOf:
    """Per-token tensors of the experience, as the rows of one micro-batch on this rank want them."""

    def __init__(self, batch: StreamBatch, topology: Topology) -> None:
        self._batch = batch
        packed: PackedTokens = batch.packed
        self._share = share(packed, cp_rank=topology.cp_rank, cp_size=topology.layout.cp)

    def __call__(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return stream values at the rows that predict their tokens."""
        return self.own(shift_to_rows(self._batch.take(values_T)))

    def own(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Return this context-parallel rank's part of the micro-batch's rows."""
        return self._share.take(rows_T)


def _summed(found: Sequence[torch.Tensor], size: int, topology: Topology) -> torch.Tensor:
    """Return sums over micro-batches and over dp × cp, known to the last stage, on every stage."""
    sums = torch.zeros(size, device=topology.device)
    for part in found:
        sums = sums + part.float()
    dist.all_reduce(sums, group=topology.dp_cp_group)
    return _from_last_stage(sums, topology)


def _largest(found: Sequence[torch.Tensor], topology: Topology) -> torch.Tensor:
    maxima = torch.full((2,), -torch.inf, device=topology.device)
    for part in found:
        maxima = torch.maximum(maxima, part.float())
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=topology.dp_cp_group)
    return _from_last_stage(maxima, topology)


def _from_last_stage(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    if topology.layout.pp > 1:
        dist.broadcast(values, topology.last_stage_rank, group=topology.pp_group)
    return values
