"""One optimizer step: forward and backward of all roles, then the weights of all change, or of none."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.scoring.packed_batches import PackedBatch
from glm_rlhf.engine.training.loss import Learner, Loss, LossTerm, Statistics
from glm_rlhf.parallel.model.packing import PackedTokens
from glm_rlhf.parallel.pipeline.oom_retry import run_with_oom_retry
from glm_rlhf.parallel.pipeline.schedule import run_models
from glm_rlhf.parallel.pipeline.timing import PassTimes
from glm_rlhf.parallel.runtime.nonfinite import (
    abbreviate,
    find_nonfinite,
    gather_findings,
    raise_if_nonfinite,
)
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class TermStatistics:
    """A term's statistics over all micro-batches and ranks, the same on every rank."""

    sums: torch.Tensor
    """[K], in the order of `Loss.sum_names`."""
    maxima: torch.Tensor
    """fp32 [`Loss.num_maxima`]; minus infinity without a micro-batch."""

    def by_name(self, loss: Loss) -> dict[str, float]:
        """Return the sums by their names."""
        return dict(zip(loss.sum_names, self.sums.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleStep:
    """The result of one role's part in a step, the same on every rank."""

    grad_norm: float
    """Norm of the gradient over the whole model before clipping; NaN where a loss was not finite."""
    terms: tuple[TermStatistics, ...]
    """Statistics of each of the learner's terms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The result of one step of all learners, the same on every rank."""

    roles: tuple[RoleStep, ...]
    """In the order of the learners."""
    fault: str = ""
    """What was not finite, on which ranks and in which records or weights; empty where all was."""

    @property
    def is_applied(self) -> bool:
        """Whether the weights changed: every loss and gradient was finite."""
        return not self.fault


def take_step(
    learners: Sequence[Learner],
    *,
    topology: Topology,
    phases: Phases | None = None,
    dtype: torch.dtype = torch.float64,
) -> StepResult:
    """Take one optimizer step of all learners, or of none; every rank of the world calls this.

    Over pipeline stages the micro-batches of all learners go through one schedule, into a gradient each, and
    its time is shared as their passes took it. Without, where no stage waits, each has a schedule of its own:
    the time of each is known, and so is whose memory ran out.

    Weights change once every gradient is known to be finite. A loss or gradient that is not finite leaves
    weights and optimizers as they were, on all ranks: the decision is taken from numbers that were added up
    over the world. An optimizer in backward has changed its own weights by then, see `InBackwardState`, and
    of a learner before it too. Where memory runs out for several records their micro-batch is split, and the
    step begins again: its gradient is the same.

    Args:
        learners: one or several.
        topology: layout and groups.
        phases: takes the seconds of each learner, by role.
        dtype: in which statistics are added up.

    Raises:
        ValueError: there is no memory for a single record or sequence; on every rank.
    """
    phases = phases or Phases()
    if len(learners) > 1 and topology.layout.pp > 1:
        times = PassTimes(topology.device)
        with phases.shared("steps", times.shared):
            passes = [_backward(learners, topology, times)]
    else:
        passes = []
        for learner in learners:
            with phases.phase(learner.role):
                passes.append(_backward([learner], topology))
            if passes[-1].fault:
                break
    fault = passes[-1].fault
    norms = [norm for one in passes for norm in one.norms]
    outputs = [output for one in passes for output in one.outputs]
    steps = []
    for place, learner in enumerate(learners):
        norm = norms[place] if place < len(norms) else math.nan
        with phases.shared("apply", partial(_all_of, learner.role)):
            if not fault:
                learner.state.apply(norm)
            terms = [
                _reduced([s for owner, s in outputs if owner is term], term.loss, topology, dtype)
                for term in learner.terms
            ]
        steps.append(RoleStep(grad_norm=norm, terms=tuple(terms)))
    return StepResult(roles=tuple(steps), fault=fault)


def evaluate(
    chunks: Sequence[torch.nn.Module], term: LossTerm, *, topology: Topology, role: str
) -> dict[str, float]:
    """Return a loss's sums over all ranks by name, without gradients; every rank of the world calls this.

    Raises:
        ValueError: there is no memory for a single record.
        FloatingPointError: the loss of some records is NaN or Inf; on every rank, with the records.
    """
    outputs, assigned = _run([(role, chunks, (term,))], topology, forward_only=True)
    raise_if_nonfinite(
        _nonfinite_losses([role], outputs, assigned), "nothing is evaluated", device=topology.device
    )
    return _reduced([found for _, found in outputs], term.loss, topology, torch.float64).by_name(term.loss)


def _all_of(role: str, seconds: float) -> dict[str, float]:
    return {role: seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assigned:
    """A micro-batch, whose it is, and in which term."""

    model: int
    term: LossTerm
    batch: PackedBatch

    @property
    def packed(self) -> PackedTokens:
        """Its tokens."""
        return self.batch.packed

    def split_in_two(self, multiple: int) -> "tuple[_Assigned, ...]":
        """Return it in two; see `oom_retry.Divisible`."""
        return tuple(dataclasses.replace(self, batch=half) for half in self.batch.split_in_two(multiple))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Backward:
    """What one schedule of some learners left, their gradients in their states apart."""

    outputs: list[tuple[LossTerm, Statistics]]
    """Of each micro-batch on the last stage; elsewhere none."""
    norms: list[float] = field(default_factory=list)
    """Gradient norm of each learner, over the whole model; none where a loss was not finite."""
    fault: str
    """What was not finite, the same on every rank."""


def _backward(learners: Sequence[Learner], topology: Topology, times: PassTimes | None = None) -> _Backward:
    """Run the micro-batches of some learners forward and backward in one schedule."""
    models = [(learner.role, learner.state.chunks, learner.terms) for learner in learners]

    def zero_grad() -> None:
        for learner in learners:
            learner.state.zero_grad()

    outputs, assigned = _run(models, topology, forward_only=False, before=zero_grad, times=times)
    findings = _nonfinite_losses([learner.role for learner in learners], outputs, assigned)
    if found := find_nonfinite(findings, device=topology.device):
        return _Backward(outputs=outputs, fault=f"not finite: {found}")
    norms = [learner.state.grad_norm() for learner in learners]
    return _Backward(outputs=outputs, norms=norms, fault=_norm_fault(learners, norms, assigned))


def _nonfinite_losses(
    roles: Sequence[str], outputs: Sequence[tuple[LossTerm, Statistics]], assigned: Sequence[_Assigned]
) -> list[str]:
    """Return what a message says of the micro-batches of this rank whose loss is NaN or Inf."""
    findings = [
        f"the {roles[one.model]}'s loss on {one.term.name_items(one.batch.items)}"
        for one, (_, statistics) in zip(assigned if outputs else (), outputs, strict=True)
        if not bool(statistics.sums.isfinite().all())
    ]
    return list(dict.fromkeys(findings))


def _run(
    models: Sequence[tuple[str, Sequence[torch.nn.Module], Sequence[LossTerm]]],
    topology: Topology,
    *,
    forward_only: bool,
    before: Callable[[], None] | None = None,
    times: PassTimes | None = None,
) -> tuple[list[tuple[LossTerm, Statistics]], list[_Assigned]]:
    """Run the terms' micro-batches through one schedule, again on smaller ones where memory runs out.

    Args:
        models: role, this rank's chunks and terms of each.
        topology: layout and groups.
        forward_only: whether nothing is kept for backward.
        before: called before each attempt.
        times: takes the time of each model's passes.

    Returns:
        (term and statistics of each micro-batch on the last stage, elsewhere nothing; the micro-batches).
    """

    def run(batches: Sequence[_Assigned]) -> list[Statistics]:
        if before is not None:
            before()
        found: list[Statistics] = run_models(
            [chunks for _, chunks, _ in models],
            [[one.packed for one in batches if one.model == number] for number in range(len(models))],
            lambda model, hidden_TD, index: batches[index].term(model, hidden_TD, batches[index].batch),
            topology=topology,
            forward_only=forward_only,
            times=times,
        )
        return list(found) if topology.is_last_stage else []

    found, assigned = run_with_oom_retry(
        run,
        [
            _Assigned(model=number, term=term, batch=batch)
            for number, (_, _, terms) in enumerate(models)
            for term in terms
            for batch in term.batches
        ],
        lambda one: one.term.name_items(one.batch.items),
        models=[chunks for _, chunks, _ in models],
        topology=topology,
        forward_only=forward_only,
    )
    return [(one.term, own) for one, own in zip(assigned if found else (), found, strict=True)], assigned


def _norm_fault(learners: Sequence[Learner], norms: Sequence[float], assigned: Sequence[_Assigned]) -> str:
    """Return what a message says of gradient norms that are not finite, the same on every rank."""
    said: list[str] = []
    findings: list[str] = []
    for number, (learner, norm) in enumerate(zip(learners, norms, strict=True)):
        if math.isfinite(norm):
            continue
        said.append(f"the {learner.role}'s gradient has the norm {norm}")
        if names := learner.state.nonfinite_gradients():
            own = [one for one in assigned if one.model == number and one.term is learner.terms[0]]
            items = sorted(item for one in own for item in one.batch.items)
            on = f" in a step on {learner.terms[0].name_items(items)}" if items else ""
            findings.append(f"those of {abbreviate(names)} of the {learner.role}{on}")
    if not said:
        return ""
    where = gather_findings(findings) or "no gradient by itself, their squares overflow"
    return f"{' and '.join(said)}; not finite: {where}"


def _reduced(
    found: Sequence[Statistics], loss: Loss, topology: Topology, dtype: torch.dtype
) -> TermStatistics:
    """Return statistics of the last stage over micro-batches and dp × cp ranks, on every stage."""
    sums = torch.zeros(len(loss.sum_names), dtype=dtype, device=topology.device)
    for one in found:
        sums = sums + one.sums.to(dtype)
    dist.all_reduce(sums, group=topology.dp_cp_group)
    maxima = torch.full((loss.num_maxima,), -torch.inf, device=topology.device)
    if loss.num_maxima:
        for one in found:
            assert one.maxima is not None, "the loss says that it has maxima"
            maxima = torch.maximum(maxima, one.maxima.float())
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=topology.dp_cp_group)
    if topology.layout.pp > 1:
        for values in (sums, maxima) if loss.num_maxima else (sums,):
            dist.broadcast(values, topology.last_stage_rank, group=topology.pp_group)
    return TermStatistics(sums=sums, maxima=maxima)
