"""One optimizer step of PPO: gradients of its roles, then all their weights change or none do."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.rl.experience import answers_with
from glm_rlhf.engine.scoring.record_batches import MicroBatch
from glm_rlhf.engine.scoring.rollout_batches import StreamBatch
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import PackedTokens
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.optim.training_state import StepResult
from glm_rlhf.parallel.pipeline.oom_retry import run_with_oom_retry
from glm_rlhf.parallel.pipeline.schedule import run_models
from glm_rlhf.parallel.pipeline.timing import PassTimes
from glm_rlhf.parallel.runtime.nonfinite import abbreviate, gather_findings, raise_if_nonfinite
from glm_rlhf.parallel.runtime.topology import Topology

Step = TypeVar("Step")

_CONSEQUENCE = "no step was taken, or with optimizer.in_backward a part of one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner(Generic[Step]):
    """A role's part in an optimizer step."""

    role: str
    """Its name: policy or critic."""
    state: AnyTrainingState
    """What it trains with."""
    batches: tuple[StreamBatch | MicroBatch, ...]
    """Its micro-batches: answers, and demonstrations behind them; none where this rank has no share."""
    loss: Callable[[GLMModel, torch.Tensor, Any], tuple[torch.Tensor, Any]]
    """`(model, hidden_TD, batch) -> (loss, statistics)`: of answers with `sums`, of demonstrations sums."""
    reduce_statistics: Callable[[StepResult, Sequence[Any]], Step]
    """What became of the step, of the statistics on the last stage; every rank calls it together."""


def take_steps(
    learners: Sequence[Learner[Any]],
    rollouts: Rollouts,
    *,
    topology: Topology,
    phases: Phases | None = None,
) -> list[Any]:
    """Take one optimizer step of all learners, or of none; return what they conclude. Every rank calls this.

    Over pipeline stages micro-batches of all go through one schedule, into a gradient each, and its time is
    shared as their passes took it. Without, where no stage waits, each has a schedule of its own: the time
    of each is known, and so is whose memory ran out. Weights change when every gradient is known to be
    finite; an optimizer in backward has changed its own by then.

    Args:
        learners: who learns; one or several.
        rollouts: the answers that they learn from.
        topology: layout and groups.
        phases: is told the seconds of each, by role.

    Raises:
        FloatingPointError: a loss or gradient of one is not finite; on every rank. No step of any was taken,
            or with an optimizer in backward perhaps a part, and that of a learner before it. The message
            names the ranks, and the answers or the weights.
        ValueError: there is no memory for a single sequence; on every rank.
    """
    phases = phases or Phases()
    if len(learners) > 1 and topology.layout.pp > 1:
        times = PassTimes(topology.device)
        with phases.shared("steps", times.shared):
            ready = _ready_to_step(learners, rollouts, topology, times)
    else:
        ready = []
        for learner in learners:
            with phases.phase(learner.role):
                ready += _ready_to_step([learner], rollouts, topology)
    steps = []
    for learner, (norm, statistics) in zip(learners, ready, strict=True):
        with phases.shared("apply", lambda seconds, role=learner.role: {role: seconds}):
            learner.state.apply(norm)
            steps.append(learner.reduce_statistics(StepResult(is_applied=True, grad_norm=norm), statistics))
    return steps


def _ready_to_step(
    learners: Sequence[Learner[Any]],
    rollouts: Rollouts,
    topology: Topology,
    times: PassTimes | None = None,
) -> list[tuple[float, list[Any]]]:
    """Return each learner's gradient norm, a finite one, and its statistics, after one schedule of all."""
    found, batches = _gradients(learners, rollouts, topology, times)
    told = list(zip(batches, found, strict=True)) if found else []
    words = [_finding(learners[batch.learner].role, one, batch.batch, rollouts) for batch, one in told]
    findings = list(dict.fromkeys(one for one in words if one is not None))
    raise_if_nonfinite(findings, _CONSEQUENCE, device=topology.device)
    norms = [learner.state.grad_norm() for learner in learners]
    _refuse_norms(learners, norms, batches, rollouts)
    return [
        (norm, [one for batch, one in told if batch.learner == place]) for place, norm in enumerate(norms)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assigned:
    """A micro-batch and whose it is."""

    learner: int
    batch: StreamBatch | MicroBatch

    @property
    def packed(self) -> PackedTokens:
        """Its tokens."""
        return self.batch.packed

    def split_in_two(self, multiple: int) -> "tuple[_Assigned, ...]":
        """Return it in two; see `fitting.Divisible`."""
        return tuple(dataclasses.replace(self, batch=half) for half in self.batch.split_in_two(multiple))


def _gradients(
    learners: Sequence[Learner[Any]], rollouts: Rollouts, topology: Topology, times: PassTimes | None
) -> tuple[list[Any], list[_Assigned]]:
    """Return what losses tell of the micro-batches on the last stage, and the micro-batches as memory has
    room for them; the states hold their gradients.
    """

    def begin(batches: Sequence[_Assigned]) -> list[Any]:
        for learner in learners:
            learner.state.zero_grad()
        own = [[b.packed for b in batches if b.learner == place] for place in range(len(learners))]
        return run_models(
            [learner.state.chunks for learner in learners],
            own,
            lambda model, hidden_TD, index: learners[batches[index].learner].loss(
                model, hidden_TD, batches[index].batch
            ),
            topology=topology,
            forward_only=False,
            times=times,
        )

    def name(batch: _Assigned) -> str:
        if isinstance(batch.batch, MicroBatch):
            return "a demonstration"
        return f"answer {abbreviate(_answers_of(rollouts, batch.batch))} with its prompt"

    given = [
        _Assigned(learner=place, batch=batch)
        for place, learner in enumerate(learners)
        for batch in learner.batches
    ]
    models = [learner.state.chunks for learner in learners]
    return run_with_oom_retry(begin, given, name, models=models, topology=topology, forward_only=False)


def _finding(role: str, statistics: Any, batch: StreamBatch | MicroBatch, rollouts: Rollouts) -> str | None:
    """Return what a message says of a loss that is not finite."""
    is_demonstration = isinstance(batch, MicroBatch)
    sums = statistics if is_demonstration else statistics.sums
    if bool(sums.isfinite().all()):
        return None
    if is_demonstration:
        return "the loss on demonstrations"
    return f"the {role}'s loss on answers {abbreviate(_answers_of(rollouts, batch))}"


def _refuse_norms(
    learners: Sequence[Learner[Any]],
    norms: Sequence[float],
    batches: Sequence[_Assigned],
    rollouts: Rollouts,
) -> None:
    """Raise FloatingPointError on all ranks where some gradient's norm, the same on all, is not finite."""
    said, where = [], []
    for place, (learner, norm) in enumerate(zip(learners, norms, strict=True)):
        if math.isfinite(norm):
            continue
        said.append(f"the {learner.role}'s gradient has the norm {norm}")
        if names := learner.state.nonfinite_gradients():
            own = [b.batch for b in batches if b.learner == place and isinstance(b.batch, StreamBatch)]
            answers = sorted(i for batch in own for i in _answers_of(rollouts, batch))
            where.append(
                f"those of {abbreviate(names)} of the {learner.role} in a step on answers "
                f"{abbreviate(answers)}"
            )
    if said:
        raise FloatingPointError(
            f"{' and '.join(said)}; {_CONSEQUENCE}; not finite: "
            f"{gather_findings(where) or 'no gradient by itself, their squares overflow'}"
        )


def _answers_of(rollouts: Rollouts, batch: StreamBatch) -> list[int]:
    chosen_T = torch.zeros_like(rollouts.tokens_T, dtype=torch.bool)
    chosen_T[batch.rows] = True
    return answers_with(rollouts, chosen_T)
