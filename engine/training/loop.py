"""The loop that supervised and preference training share: records in, checkpoints and metrics out."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from tqdm import tqdm

from glm_rlhf.engine.config.training import TrainSection
from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.data.store.examples import Records
from glm_rlhf.engine.observe.timer import Timer
from glm_rlhf.engine.runs.checkpoints import is_due
from glm_rlhf.engine.runs.context import RunContext
from glm_rlhf.engine.scoring.packed_batches import batches_of_records
from glm_rlhf.engine.training.loss import Learner, LossTerm, RecordLoss
from glm_rlhf.engine.training.step import StepResult, evaluate, take_step
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.nonfinite import abbreviate
from glm_rlhf.parallel.runtime.preemption import Preempted, preemption_requested
from glm_rlhf.parallel.runtime.spans import span
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Records that are looked at, but not learned from."""

    records: Records
    """Where they are."""
    loss: RecordLoss
    """What is measured on them."""
    numbers: Sequence[int]
    """Which of them count, the same at every evaluation."""
    on_result: Callable[[int, Mapping[str, float]], None] | None = None
    """Takes a step and the objective's sums, on the reporter only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopProgress:
    """What the loop resumes from, beside models, optimizers and random generators; as saved with them."""

    step: int = 0
    """Steps behind it; they decide which records come next, and the learning rate."""
    num_skipped: int = 0
    """Steps that were not taken because something was not finite."""
    num_in_a_row: int = 0
    """The last of them that came in a row."""
    num_tokens: int = 0
    """Tokens that went forward and backward, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopResult:
    """What a run came to."""

    first_loss: float
    """Of the first step."""
    last_loss: float
    """Of the last step that was taken."""
    num_skipped: int
    """Steps that were not taken because something was not finite."""
    num_tokens: int
    """Tokens that went forward and backward, over all ranks."""
    elapsed_s: float
    """Seconds of the whole loop."""


def train(
    run: RunContext,
    state: AnyTrainingState,
    loss: RecordLoss,
    records: Records,
    sampler: BatchSampler,
    *,
    lr_of: Callable[[int], float],
    held: HeldOut | None = None,
) -> LoopResult:
    """Train to the end of the run; every rank calls this together.

    Step n of the metrics is what the n-th update did, with the evaluation after it where one is due, and the
    time that saving before it took; an evaluation before the first update stands at step 0.

    Args:
        run: where metrics and checkpoints go, and where the run resumes.
        state: model and optimizer.
        loss: what is minimised.
        records: what is learned from.
        sampler: which of them each step takes, over all ranks.
        lr_of: learning rate of a step, from 0.
        held: records to evaluate on.

    Raises:
        ValueError: too many steps in a row were not finite; the message names ranks and records.
        Preempted: a rank was asked to leave, and what there is was saved; on every rank.
    """
    settings, topology = run.config.train, run.topology
    start = time.monotonic()
    progress = LoopProgress() if run.progress is None else LoopProgress(**run.progress)
    losses: list[float] = []
    saving: dict[str, float] = {}
    bar = tqdm(
        initial=progress.step,
        total=settings.steps,
        desc="train",
        unit=" steps",
        disable=None if topology.is_main_rank else True,
    )
    if held is not None and progress.step == 0:
        run.write(0, _evaluate(state, held, 0, settings, topology))
    for index in range(progress.step, settings.steps):
        timer = Timer()
        numbers = sampler.batch(index)
        term = _term(loss, records, numbers, settings, topology)
        timer.split("timing_s/data")
        lr = lr_of(index)
        state.set_lr(lr)
        with span("update"):
            learner = Learner(role=_role(state), state=state, terms=(term,))
            result = take_step([learner], topology=topology)
        timer.split("timing_s/update")
        step_tokens = int(records.lengths[numbers].sum())
        (role,) = result.roles
        sums = role.terms[0].by_name(loss)
        metrics = _prefixed(loss.metrics(sums), loss.prefix)
        metrics |= _of_step(result, lr, step_tokens, timer.total_s, loss.prefix, topology)
        if result.is_applied:
            losses.append(sums["loss"])
        progress = LoopProgress(
            step=index + 1,
            num_skipped=progress.num_skipped + (not result.is_applied),
            num_in_a_row=0 if result.is_applied else progress.num_in_a_row + 1,
            num_tokens=progress.num_tokens + step_tokens,
        )
        is_last = index + 1 == settings.steps
        has_to_stop = progress.num_in_a_row >= settings.max_nonfinite_steps
        if held is not None and not has_to_stop and is_due(index + 1, settings.eval_every, is_last):
            with span("eval"):
                metrics |= _evaluate(state, held, index + 1, settings, topology)
            timer.split("timing_s/eval")
        run.write(index + 1, metrics | timer.splits | saving)
        if has_to_stop:
            bar.close()
            raise ValueError(
                f"stopped after {progress.num_in_a_row} steps in a row without an update: at step "
                f"{index + 1} {result.fault}; lower optimizer.lr, look at these records, or start from a "
                "checkpoint whose weights are finite"
            )
        saving = {}
        with span("save"):  # after the metrics, which resume from it
            is_saved = run.checkpoints.after_step(index + 1, asdict(progress))
        if is_saved:
            timer.split("timing_s/save")
            saving = {"timing_s/save": timer.splits["timing_s/save"]}
        bar.set_postfix(loss=f"{sums['loss']:.4f}", refresh=False)
        bar.update()
        if not is_last and preemption_requested((None, topology.device)):
            bar.close()
            run.checkpoints.save_and_exit(index + 1, asdict(progress))
            raise Preempted
    bar.close()
    return LoopResult(
        first_loss=losses[0] if losses else math.nan,
        last_loss=losses[-1] if losses else math.nan,
        num_skipped=progress.num_skipped,
        num_tokens=progress.num_tokens,
        elapsed_s=time.monotonic() - start,
    )


def _term(
    loss: RecordLoss,
    records: Records,
    numbers: Sequence[int],
    settings: TrainSection,
    topology: Topology,
) -> LossTerm:
    """Return the loss on records of one step, this rank's share of them packed."""
    return LossTerm(
        loss=loss,
        batches=batches_of_records(
            records,
            numbers,
            max_tokens=settings.micro_batch_tokens,
            topology=topology,
            streams=loss.streams,
        ),
        denominator=loss.denominator(numbers),
        name_items=lambda items: abbreviate([records.name(item) for item in items]),
    )


def _evaluate(
    state: AnyTrainingState, held: HeldOut, step: int, settings: TrainSection, topology: Topology
) -> dict[str, float | None]:
    state.gather_weights()
    term = _term(held.loss, held.records, list(held.numbers), settings, topology)
    try:
        sums = evaluate(state.chunks, term, topology=topology, role=_role(state))
    except FloatingPointError as error:  # the same on every rank
        log(f"the evaluation after step {step} was skipped: {error}", topology)
        return {"eval/is_skipped": 1.0}
    if held.on_result is not None and topology.is_main_rank:
        held.on_result(step, sums)
    return _prefixed(held.loss.metrics(sums), "eval")


def _role(state: AnyTrainingState) -> str:
    return state.bare_chunks[0].role


def _of_step(
    result: StepResult, lr: float, num_tokens: int, elapsed_s: float, prefix: str, topology: Topology
) -> dict[str, float | None]:
    speed = num_tokens / elapsed_s
    return {
        f"{prefix}/grad_norm": result.roles[0].grad_norm,
        f"{prefix}/lr": lr,
        f"{prefix}/is_step_skipped": float(not result.is_applied),
        "perf/tokens_per_s": speed,
        "perf/tokens_per_s_per_gpu": speed / topology.world_size,
        "timing_s/step": elapsed_s,
    }


def _prefixed(metrics: Mapping[str, float | None], prefix: str) -> dict[str, float | None]:
    return {f"{prefix}/{name}": number for name, number in metrics.items()}
