"""Estimated time of a PPO iteration under a layout, by phase."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from glm_rlhf.engine.cost.activations import RankMicroBatch
from glm_rlhf.engine.cost.hardware import Cluster
from glm_rlhf.engine.cost.pass_time import (
    DecodeCosts,
    PassCosts,
    forward_flop,
    layer_matrix_elements,
    optimizer_step,
)
from glm_rlhf.engine.cost.pipeline_simulation import is_padding, simulate_generation, simulate_passes
from glm_rlhf.engine.cost.workload import Choice, Roles, Workload
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.pipeline_order import Pass, num_padding_micro_batches
from glm_rlhf.parallel.spec.weight_map import SCALAR_ROLES

_CONTEXTS = 8
"""Number of positions along an answer at which the time of a decode step is computed."""
_ROUNDS = 16
"""Rounds of generation simulated at each of these positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """Time of one phase of an iteration, averaged over stages."""

    seconds: float
    """Total time."""
    communication_s: float
    """Part of it in collectives."""
    idle_s: float
    """Part of it waiting for other stages."""
    flop: float
    """Useful FLOP of products and attention on all ranks together, without recomputation."""

    def __add__(self, other: "PhaseTime") -> "PhaseTime":
        return PhaseTime(
            seconds=self.seconds + other.seconds,
            communication_s=self.communication_s + other.communication_s,
            idle_s=self.idle_s + other.idle_s,
            flop=self.flop + other.flop,
        )


NOTHING = PhaseTime(seconds=0.0, communication_s=0.0, idle_s=0.0, flop=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimated time of an iteration."""

    phases: dict[str, PhaseTime]
    """By name: generate, baseline, score, train critic, train policy."""
    num_tokens: int
    """Tokens of all sequences, prompts included."""
    num_gpus: int
    """Number of GPUs, one rank each."""
    peak_flop_per_s: float
    """Peak rate of one GPU."""

    @property
    def total(self) -> PhaseTime:
        """Sum of all phases."""
        return sum(self.phases.values(), NOTHING)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens of an iteration / (its time × GPUs)."""
        return self.num_tokens / self.total.seconds / self.num_gpus

    def mfu(self, names: tuple[str, ...]) -> float:
        """Return useful FLOP / (peak rate of all GPUs × time), over the named phases."""
        phases = [self.phases[name] for name in names if name in self.phases]
        seconds = sum(phase.seconds for phase in phases)
        flop = sum(phase.flop for phase in phases)
        return flop / (seconds * self.num_gpus * self.peak_flop_per_s) if seconds else 0.0


def estimate(
    roles: Roles, work: Workload, choice: Choice, cluster: Cluster, *, num_concurrent: int, has_baseline: bool
) -> Estimate:
    """Return the estimated time of an iteration; pipeline schedules are simulated.

    Args:
        roles: shapes of the models.
        work: workload of the iteration.
        choice: layout and micro-batches.
        cluster: rates and links.
        num_concurrent: sequences generated at once on a rank, limited by the key/value cache.
        has_baseline: whether the reference also answers each prompt once.
    """
    plan = _Plan(roles=roles, work=work, choice=choice, cluster=cluster)
    num_sequences = plan.num_sequences
    phases = {"generate": plan.generation(roles.policy, num_sequences, num_concurrent)}
    if has_baseline:
        num_answers = num_sequences // work.num_samples
        phases["baseline"] = plan.generation(roles.reference, num_answers, num_concurrent)
        if roles.reward is not None:
            phases["baseline"] += plan.scoring("reward", roles.reward, num_answers)
    score = NOTHING
    for name, model in roles.items:
        if name != "policy":
            score += plan.scoring(name, model, num_sequences)
        else:
            share = num_sequences
            if not work.recomputes_logprobs:
                share = min(num_sequences, plan.sequences_per_batch)
            score += plan.scoring(name, model, share)
    phases["score"] = score
    trained = {"critic": roles.critic, "policy": roles.policy}
    if choice.layout.pp > 1:
        phases |= plan.training(trained)
    else:
        for name, model in trained.items():
            phases |= plan.training({name: model})
    return Estimate(
        phases=phases,
        num_tokens=work.num_sequences * work.mean_tokens,
        num_gpus=cluster.num_gpus,
        peak_flop_per_s=cluster.gpu.peak_flop_per_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The phases of one choice."""

    roles: Roles
    work: Workload
    choice: Choice
    cluster: Cluster

    @property
    def num_sequences(self) -> int:
        """Answers per data-parallel rank."""
        return self.choice.num_sequences(self.work, self.cluster.num_gpus)

    @property
    def sequences_per_batch(self) -> int:
        """Sequences of mean length per micro-batch."""
        return max(1, self.choice.micro_batch_tokens // self.work.mean_tokens)

    @property
    def _dp(self) -> int:
        return self.choice.layout.dp(self.cluster.num_gpus)

    def training(self, models: Mapping[str, GLMConfig]) -> dict[str, PhaseTime]:
        """Return the time of all optimizer steps of roles whose micro-batches share a schedule, by phase.

        The time of the schedule is divided in proportion to the passes of each role.
        """
        in_step = -(-self.num_sequences // self.work.minibatches)
        phases = {}
        for role, passes in self._passes(models, in_step, trains=True).items():
            update = optimizer_step(
                models[role],
                self.cluster,
                self.choice,
                itemsize=self.work.itemsize,
                has_scalar_head=role == "critic",
            )
            step = passes + PhaseTime(
                seconds=update.total_s, communication_s=update.communication_s, idle_s=0.0, flop=0.0
            )
            phases[f"train {role}"] = _times(step, self.work.epochs * self.work.minibatches)
        return phases

    def scoring(self, role: str, model: GLMConfig, num_sequences: int) -> PhaseTime:
        """Return the time of one pass without gradients over the sequences of a data-parallel rank."""
        return self._passes({role: model}, num_sequences, trains=False)[role]

    def _passes(
        self, models: Mapping[str, GLMConfig], num_sequences: int, *, trains: bool
    ) -> dict[str, PhaseTime]:
        """Return the times of one schedule that runs the sequences through each model in turn."""
        work, layout = self.work, self.choice.layout
        num_batches = -(-num_sequences // self.sequences_per_batch)
        tokens = num_sequences * work.mean_tokens // num_batches
        share = work.mean_new_tokens / work.mean_tokens
        forward, backward, hops = {}, {}, []
        for role, model in models.items():
            batch = RankMicroBatch(model=model, layout=layout, num_tokens=tokens, itemsize=work.itemsize)
            costs = PassCosts(
                cluster=self.cluster,
                choice=self.choice,
                batch=batch,
                length=work.mean_tokens,
                has_scalar_head=role in SCALAR_ROLES,
                num_targets=math.ceil(batch.rows * share),
            )
            for is_last in (False, True):
                forward[role, is_last] = costs.forward(is_last=is_last, trains=trains)
            backward[role] = costs.backward()
            hops.append(costs.hop_s())
        roles = [role for role in models for _ in range(num_batches)]
        num_padding = num_padding_micro_batches(layout, len(roles))
        busy_s = dict.fromkeys(models, 0.0)

        def duration(stage: int, entry: Pass) -> float:
            if is_padding(layout, len(roles), entry):
                return 0.0
            role = roles[entry.micro_batch - num_padding]
            cost = backward[role]
            if entry.kind == "forward":
                cost = forward[role, stage == layout.pp - 1 and entry.chunk == layout.vpp - 1]
            busy_s[role] += cost.total_s
            return cost.total_s

        simulated = simulate_passes(layout, len(roles), duration, hop_s=max(hops), forward_only=not trains)
        phases, answered = {}, self._dp * num_sequences
        for role, model in models.items():
            part = busy_s[role] / sum(busy_s.values())
            communication_s = forward[role, False].communication_s + backward[role].communication_s * trains
            has_head = role in ("policy", "reference")
            flop = forward_flop(model, answered, work.mean_tokens, has_head * answered * work.mean_new_tokens)
            phases[role] = PhaseTime(
                seconds=simulated.seconds * part,
                communication_s=num_batches * layout.vpp * communication_s,
                idle_s=simulated.idle_fraction * simulated.seconds * part,
                flop=flop * (3 if trains else 1),
            )
        return phases

    def generation(self, model: GLMConfig, num_sequences: int, num_concurrent: int) -> PhaseTime:
        """Return the time of generating a data-parallel rank's answers, in waves of `num_concurrent`."""
        work, layout = self.work, self.choice.layout
        num_per_rank = -(-num_sequences // layout.cp)
        running = max(1, min(num_per_rank, num_concurrent))
        num_waves = num_per_rank / running
        num_groups = layout.pp
        rows = max(1, running // num_groups)
        costs = DecodeCosts(cluster=self.cluster, choice=self.choice, work=work, policy=model)
        hop_s = costs.hop_s(rows)
        seconds = busy_s = communication_s = 0.0
        for part in range(_CONTEXTS):
            context = work.mean_prompt_tokens + (part + 0.5) / _CONTEXTS * work.mean_new_tokens
            steps = [costs.step(rows, context=context, is_last=s == layout.pp - 1) for s in range(layout.pp)]
            simulated = simulate_generation(
                [step.total_s for step in steps],
                num_groups=num_groups,
                num_rounds=_ROUNDS,
                hop_s=hop_s,
                back_s=hop_s,
            )
            factor = num_waves * work.mean_new_tokens / _CONTEXTS / _ROUNDS
            seconds += simulated.seconds * factor
            busy_s += sum(simulated.busy_s) / layout.pp * factor
            communication_s += steps[0].communication_s * _ROUNDS * num_groups * factor
        num_prompts = num_per_rank / work.num_samples if num_sequences == self.num_sequences else num_per_rank
        prompts = costs.prefill(int(num_prompts * work.mean_prompt_tokens), length=work.mean_prompt_tokens)
        seconds += prompts.total_s
        busy_s += prompts.total_s
        communication_s += prompts.communication_s
        tokens = self._dp * num_sequences * work.mean_new_tokens
        flop = 2 * tokens * (_elements(model) + model.vocab_size * model.hidden_size)
        flop += 2 * self._dp * layout.cp * num_prompts * work.mean_prompt_tokens * _elements(model)
        return PhaseTime(
            seconds=seconds, communication_s=communication_s, idle_s=max(0.0, seconds - busy_s), flop=flop
        )


def _elements(model: GLMConfig) -> int:
    """Return the number of elements of all layers' matrices."""
    return model.num_layers * layer_matrix_elements(model, Layout())


def _times(phase: PhaseTime, factor: float) -> PhaseTime:
    return PhaseTime(
        seconds=phase.seconds * factor,
        communication_s=phase.communication_s * factor,
        idle_s=phase.idle_s * factor,
        flop=phase.flop * factor,
    )
