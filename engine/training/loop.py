"""The loop that supervised and preference training share: records in, checkpoints and metrics out."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from tqdm import tqdm

from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.data.store.examples import Records
from glm_rlhf.engine.observe.metrics import WriteMetrics
from glm_rlhf.engine.observe.timer import Timer
from glm_rlhf.engine.runs.checkpoints import RunCheckpoints, is_due
from glm_rlhf.engine.scoring.record_batches import take_share
from glm_rlhf.engine.training.step import Objective, UpdateResult, evaluate, update
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.nonfinite import abbreviate
from glm_rlhf.parallel.runtime.preemption import Preempted, preemption_requested
from glm_rlhf.parallel.runtime.spans import span
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How long, in which portions, and what happens on the way."""

    steps: int
    """Optimizer steps of the run."""
    micro_batch_tokens: int
    """Tokens that go through the model at once."""
    lr_of: Callable[[int], float]
    """Learning rate of a step, from 0."""
    eval_every: int
    """Steps between two evaluations; 0 for one at either end only."""
    max_nonfinite_steps: int
    """Steps in a row whose loss or gradient is not finite, after which the run stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Records that are looked at, but not learned from."""

    records: Records
    """Where they are."""
    objective: Objective
    """What is measured on them."""
    numbers: Sequence[int]
    """Which of them count, the same at every evaluation."""
    on_result: Callable[[int, Mapping[str, float]], None] | None = None
    """Takes a step and the objective's sums, on the reporter only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopProgress:
    """What the loop goes on from, beside models, optimizers and random generators; as saved with them."""

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
    state: AnyTrainingState,
    objective: Objective,
    records: Records,
    sampler: BatchSampler,
    settings: LoopSettings,
    *,
    topology: Topology,
    write: WriteMetrics,
    checkpoints: RunCheckpoints,
    held: HeldOut | None = None,
    progress: LoopProgress | None = None,
) -> LoopResult:
    """Train to the end of the run; every rank calls this together.

    Step n of the metrics is what the n-th update did, with the evaluation after it where one is due, and
    the time that saving before it took; an evaluation before the first update stands at step 0.

    Args:
        state: model and optimizer.
        objective: the loss.
        records: what is learned from.
        sampler: which of them each step takes, over all ranks.
        settings: of the loop.
        topology: layout and groups.
        write: metrics, on the reporter.
        checkpoints: saves what is due after each step.
        held: records to evaluate on.
        progress: where the run goes on; None for its beginning.

    Raises:
        ValueError: too many steps in a row were not finite; the message names ranks and records.
        Preempted: a rank was asked to leave, what there is was saved; on every rank.
    """
    start = time.monotonic()
    progress = progress or LoopProgress()
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
        write(0, _evaluate(state, held, 0, settings, topology))
    for index in range(progress.step, settings.steps):
        clock = Timer()
        numbers = sampler.batch(index)
        batches = take_share(records, numbers, max_tokens=settings.micro_batch_tokens, topology=topology)
        clock.split("timing_s/data")
        lr = settings.lr_of(index)
        state.set_lr(lr)
        with span("update"):
            denominator = objective.denominator(numbers)
            result = update(state, objective, batches, denominator, topology=topology, name=records.name)
        clock.split("timing_s/update")
        step_tokens = int(records.lengths[numbers].sum())
        metrics = _named(objective.metrics(result.sums), objective.prefix)
        metrics |= _of_step(result, lr, step_tokens, clock.total_s, objective.prefix, topology)
        if result.is_applied:
            losses.append(result.sums["loss"])
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
            clock.split("timing_s/eval")
        write(index + 1, metrics | clock.splits | saving)
        if has_to_stop:
            bar.close()
            raise ValueError(_why_stopped(result, progress.num_in_a_row, index + 1, records, numbers))
        saving = {}
        with span("save"):  # behind the metrics, which go on from it
            is_saved = checkpoints.after_step(index + 1, asdict(progress))
        if is_saved:
            clock.split("timing_s/save")
            saving = {"timing_s/save": clock.splits["timing_s/save"]}
        bar.set_postfix(loss=f"{result.sums['loss']:.4f}", refresh=False)
        bar.update()
        if not is_last and preemption_requested((None, topology.device)):
            bar.close()
            checkpoints.save_and_exit(index + 1, asdict(progress))
            raise Preempted
    bar.close()
    return LoopResult(
        first_loss=losses[0] if losses else math.nan,
        last_loss=losses[-1] if losses else math.nan,
        num_skipped=progress.num_skipped,
        num_tokens=progress.num_tokens,
        elapsed_s=time.monotonic() - start,
    )


def _evaluate(
    state: AnyTrainingState, held: HeldOut, step: int, settings: LoopSettings, topology: Topology
) -> dict[str, float | None]:
    state.gather_weights()
    batches = take_share(
        held.records, list(held.numbers), max_tokens=settings.micro_batch_tokens, topology=topology
    )
    denominator = held.objective.denominator(held.numbers)
    sums = evaluate(
        state.chunks, held.objective, batches, denominator, topology=topology, name=held.records.name
    )
    if held.on_result is not None and topology.is_main_rank:
        held.on_result(step, sums)
    return _named(held.objective.metrics(sums), "eval")


def _of_step(
    result: UpdateResult, lr: float, num_tokens: int, elapsed_s: float, prefix: str, topology: Topology
) -> dict[str, float | None]:
    speed = num_tokens / elapsed_s
    return {
        f"{prefix}/grad_norm": result.grad_norm,
        f"{prefix}/lr": lr,
        f"{prefix}/is_step_skipped": float(not result.is_applied),
        "perf/tokens_per_s": speed,
        "perf/tokens_per_s_per_gpu": speed / topology.world_size,
        "timing_s/step": elapsed_s,
    }


def _named(metrics: Mapping[str, float | None], prefix: str) -> dict[str, float | None]:
    return {f"{prefix}/{name}": number for name, number in metrics.items()}


def _why_stopped(
    result: UpdateResult, num_in_a_row: int, step: int, records: Records, numbers: Sequence[int]
) -> str:
    loss = result.sums["loss"]
    if result.nonfinite_records:
        what = f"the loss is {loss} at step {step}, " + "; ".join(
            f"on rank {rank} with {', '.join(records.name(number) for number in numbers[:3])}"
            + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")
            for rank, numbers in result.nonfinite_records[:3]
        )
    elif math.isfinite(loss):
        of_step = abbreviate([records.name(number) for number in numbers])
        what = f"the gradient's norm is {result.grad_norm} at step {step}"
        what += f", at a loss of {loss:.4g} on {of_step}"
        what += f", {result.where}" if result.where else ""
    else:
        what = f"the loss is {loss} at step {step}, added up over micro-batches that are finite"
    return (
        f"stopped after {num_in_a_row} steps in a row without an update: {what}; lower optimizer.lr, look at "
        "these records, or start from a checkpoint whose weights are finite"
    )
