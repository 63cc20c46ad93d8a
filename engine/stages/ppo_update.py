"""One update: epochs of mini-batches through policy and critic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from glm_rlhf.engine.stages.experience import answers_with
from glm_rlhf.engine.stages.micro_batches import MicroBatch
from glm_rlhf.engine.stages.ppo_settings import PPOSettings
from glm_rlhf.engine.stages.sft_term import SFTTerm
from glm_rlhf.engine.stages.stream_batches import StreamBatch, stream_batches
from glm_rlhf.engine.types import Experience, Rollouts
from glm_rlhf.kernels import ppo_value_loss
from glm_rlhf.kernels.reference.policy_loss import POLICY_SUMS, PolicyStatistics
from glm_rlhf.kernels.reference.value_loss import VALUE_SUMS, ValueStatistics
from glm_rlhf.parallel.fitting import run_fitting
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.heads import next_tokens, shift_to_rows, token_values
from glm_rlhf.parallel.in_backward import AnyTrainingState
from glm_rlhf.parallel.nonfinite import gathered, named, refuse_nonfinite
from glm_rlhf.parallel.optimizer import StepResult
from glm_rlhf.parallel.packing import PackedTokens, share
from glm_rlhf.parallel.schedule import run_micro_batches
from glm_rlhf.parallel.topology import Topology
from glm_rlhf.parallel.vocab_loss import linear_ppo_loss


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


def mini_batches(
    experience: Experience, settings: PPOSettings, *, seed: int, topology: Topology
) -> list[MiniBatch]:
    """Return one epoch's mini-batches: all ranks' sequences in random order, cut in even parts.

    Which sequences form a mini-batch follows from the seed, not from the layout; a rank has those of its
    share. Every rank of the topology calls this: the data-parallel group sums the denominators.
    """
    rollouts = experience.rollouts
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randperm(rollouts.num_everywhere, generator=generator).tolist()
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


def policy_step(
    state: AnyTrainingState,
    experience: Experience,
    mini_batch: MiniBatch,
    settings: PPOSettings,
    *,
    topology: Topology,
    sft: SFTTerm | None = None,
) -> PolicyStep:
    """Take one optimizer step of the policy; return what it did, over all ranks.

    Loss: Σ over action tokens of the clipped objective - entropy_coef · entropy, divided by the action
    tokens of the mini-batch over all data-parallel ranks; plus, with `sft`, coef · Σ over answer tokens of
    the step's demonstrations of -log p, divided by these tokens over all data-parallel ranks. Micro-batches
    of both go through one pipeline schedule into one gradient, which is reduced and clipped once.

    Raises:
        FloatingPointError: a loss or gradient is not finite; on every rank, no step was taken.
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

    given = [*mini_batch.batches, *(sft.batches if sft is not None else ())]
    found, batches = _gradient(state, loss, given, experience.rollouts, topology)
    num_policy = sum(isinstance(batch, StreamBatch) for batch in batches)
    found, demonstrated = found[:num_policy], found[num_policy:]
    losses = [statistics.sums for statistics in found]
    result = _step_of("policy", state, losses, demonstrated, experience, batches[:num_policy], topology)
    sums = _summed(losses, len(POLICY_SUMS), topology)
    maxima = _largest([statistics.maxima for statistics in found], topology)
    sft_loss = None
    if sft is not None:
        sft_loss = _summed(demonstrated, len(sft.objective.sum_names), topology)[0].item()
    return PolicyStep(result=result, statistics=PolicyStatistics(sums=sums, maxima=maxima), sft_loss=sft_loss)


def critic_step(
    state: AnyTrainingState,
    experience: Experience,
    mini_batch: MiniBatch,
    settings: PPOSettings,
    *,
    topology: Topology,
) -> tuple[StepResult, ValueStatistics]:
    """Take one optimizer step of the critic; return its result and statistics over all ranks.

    Loss: Σ over action tokens of ½ the squared error, clipped, divided as the policy's.

    Raises:
        FloatingPointError: as `policy_step`.
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

    found, batches = _gradient(state, loss, mini_batch.batches, experience.rollouts, topology)
    losses = [statistics.sums for statistics in found]
    result = _step_of("critic", state, losses, (), experience, batches, topology)
    sums = _summed(losses, len(VALUE_SUMS), topology)
    return result, ValueStatistics(sums=sums)


def _gradient(
    state: AnyTrainingState,
    loss: Callable[[GLMModel, torch.Tensor, Any], tuple[torch.Tensor, Any]],
    batches: Sequence[StreamBatch | MicroBatch],
    rollouts: Rollouts,
    topology: Topology,
) -> tuple[list[Any], list[StreamBatch | MicroBatch]]:
    """Return what `loss` tells of the micro-batches on the last stage, and the micro-batches as memory has
    room for them; the state holds their gradient. Every rank calls this together.

    Raises:
        ValueError: there is no memory for a single sequence; on every rank.
    """

    def begin(batches: Sequence[StreamBatch | MicroBatch]) -> list[Any]:
        state.zero_grad()
        return run_micro_batches(
            state.chunks,
            [batch.packed for batch in batches],
            lambda model, hidden_TD, index: loss(model, hidden_TD, batches[index]),
            topology=topology,
            forward_only=False,
        )

    def name(batch: StreamBatch | MicroBatch) -> str:
        if isinstance(batch, MicroBatch):
            return "a demonstration"
        return f"answer {named(_answers_of(rollouts, batch))} with its prompt"

    return run_fitting(begin, batches, name, chunks=state.chunks, place=topology, forward_only=False)


def _step_of(
    role: str,
    state: AnyTrainingState,
    losses: Sequence[torch.Tensor],
    demonstrated: Sequence[torch.Tensor],
    experience: Experience,
    batches: Sequence[StreamBatch],
    topology: Topology,
) -> StepResult:
    """Change the weights, where every loss and gradient is finite; every rank calls this together.

    Args:
        role: whose step it is, for the message.
        state: holds the gradient.
        losses: sums of each micro-batch on the last stage; elsewhere nothing.
        demonstrated: of each micro-batch of demonstrations.
        experience: what is learned from.
        batches: its part in this step.
        topology: layout and groups.

    Raises:
        FloatingPointError: on every rank, no step was taken, or with an optimizer in backward perhaps a part
            of one. The message names the ranks, and the answers or the weights.
    """
    rollouts, findings = experience.rollouts, []
    for sums, batch in zip(losses, batches if losses else (), strict=True):
        if not bool(sums.isfinite().all()):
            findings.append(f"the {role}'s loss on answers {named(_answers_of(rollouts, batch))}")
    if not all(bool(sums.isfinite().all()) for sums in demonstrated):
        findings.append("the loss on demonstrations")
    consequence = "no step was taken, or with optimizer.in_backward a part of one"
    refuse_nonfinite(findings, consequence, device=topology.device)
    result = state.step()
    if not result.is_applied:
        answers = [i for batch in batches for i in _answers_of(rollouts, batch)]
        names = state.nonfinite_gradients()
        where = [f"those of {named(names)} in a step on answers {named(sorted(answers))}"] if names else []
        raise FloatingPointError(
            f"the {role}'s gradient has the norm {result.grad_norm}; {consequence}; not finite: "
            f"{gathered(where) or 'no gradient by itself, their squares overflow'}"
        )
    return result


def _answers_of(rollouts: Rollouts, batch: StreamBatch) -> list[int]:
    chosen_T = torch.zeros_like(rollouts.tokens_T, dtype=torch.bool)
    chosen_T[batch.rows] = True
    return answers_with(rollouts, chosen_T)


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
