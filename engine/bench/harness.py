"""Contenders for one task, checked against its definition and then timed in turns.

Every figure in `benchmarks/results` comes from here. All contenders of a row run in one process, one after
another, again and again (A B C A B C …), so that a machine that slows down slows all of them. A contender
whose answer is wrong, or that fails, is reported so and not timed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import quantiles
from typing import Any

import torch

from glm_rlhf.engine.bench.memory import peak_bytes
from glm_rlhf.parallel.megatron_compat.torch_operators import occupy_device

Answer = Sequence[torch.Tensor | None]
"""The result of a task; None where a contender does not compute one of the tensors."""

WARM_UP_RUNS = 2
MIN_REPETITIONS = 5
MAX_REPETITIONS = 100
# Longer than any second-level cache of today: what a contender reads comes from memory.
FLUSH_BYTES = 256 * 2**20
# About 0.5 ms at 2 GHz: the device waits so long before each run, and the host enqueues the run meanwhile.
HEAD_START_CYCLES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to do the task of a row."""

    name: str
    """Name in the report."""
    run: Callable[[], Any]
    """The timed work; its result is checked: tensors, or one tensor alone."""
    prepare: Callable[[], None] | None = None
    """Untimed, before every run: clears gradients, restores what a run overwrites."""
    answer: Callable[[Any], Answer] | None = None
    """Untimed: turns the result of `run` into what is checked; None where it is the result itself."""
    absent: str = ""
    """Why it cannot run here; empty when it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The contenders of a row on one set of inputs, and the answer they have to give."""

    contenders: Sequence[Contender]
    """Ours first."""
    expected: Callable[[], Answer] | None
    """The definition's answer, in fp32 or fp64; None where `error` judges an answer by itself."""
    tolerance: float
    """Largest error that is not wrong."""
    error: Callable[[Answer, Answer | None], float] | None = None
    """Error of an answer; None takes `relative_error`."""
    besides_bytes: int = 0
    """Memory that every contender has to allocate, such as requested gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one contender's runs."""

    median_s: float
    low_s: float
    """A quarter of the runs were faster."""
    high_s: float
    """A quarter of the runs were slower."""
    repetitions: int
    ratio: "Ratio | None" = None
    """To the runs of the first contender; None for itself, and where it was not timed in the same turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A contender's seconds ÷ the first contender's, turn by turn: a machine that slows down slows both."""

    median: float
    low: float
    """In a quarter of the turns it was less."""
    high: float
    """In a quarter of the turns it was more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The result of one contender."""

    name: str
    timing: Timing | None = None
    """None where it was not timed; `status` says why."""
    error: float | None = None
    """Distance from the definition, None where there was no answer."""
    figures: dict[str, float] = field(default_factory=dict)
    """Further measured numbers by the name of their column, units in the name."""
    status: str = ""
    """Empty, or `absent: …`, `wrong: …`, `failed: …`."""


def measure(
    problem: Problem,
    *,
    device: torch.device,
    budget_s: float,
    counts_memory: bool = False,
    warm_up_runs: int = WARM_UP_RUNS,
) -> list[Entry]:
    """Return one entry per contender, in their order.

    Args:
        problem: contenders on their inputs.
        device: where they run; on CUDA device time is taken with events behind a cache flush.
        budget_s: about how long all timed runs of the row together may take.
        counts_memory: add the column `extra MB`: the peak of what a run allocates, minus what it must.
        warm_up_runs: untimed runs of each contender, behind the one that is checked.
    """
    expected = None if problem.expected is None else problem.expected()
    entries = {
        contender.name: _checked(contender, problem, expected, device, counts_memory)
        for contender in problem.contenders
    }
    del expected
    sound = [contender for contender in problem.contenders if not entries[contender.name].status]
    timings = interleaved(sound, device=device, budget_s=budget_s, warm_up_runs=warm_up_runs)
    has_ours = problem.contenders[0] in sound
    for name, timing in timings.items():
        entries[name] = replace(entries[name], timing=timing if has_ours else replace(timing, ratio=None))
    return list(entries.values())


def interleaved(
    contenders: Sequence[Contender],
    *,
    device: torch.device,
    budget_s: float,
    warm_up_runs: int = WARM_UP_RUNS,
) -> dict[str, Timing]:
    """Return the timing of each contender by name, their runs taken in turns."""
    if not contenders:
        return {}
    clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
    for _ in range(max(1, warm_up_runs)):
        started = time.perf_counter()
        for contender in contenders:
            clock.time(contender)
        clock.seconds()
        one_round_s = time.perf_counter() - started
    repetitions = round(budget_s / max(one_round_s, 1e-9))
    repetitions = min(MAX_REPETITIONS, max(MIN_REPETITIONS, repetitions))
    for _ in range(repetitions):
        for contender in contenders:
            clock.time(contender)
    seconds = clock.seconds()
    turns = {contender.name: seconds[index :: len(contenders)] for index, contender in enumerate(contenders)}
    first = turns[contenders[0].name]
    timings = {name: replace(summary(runs), ratio=_ratio(runs, first)) for name, runs in turns.items()}
    timings[contenders[0].name] = summary(first)
    return timings


def summary(seconds: Sequence[float]) -> Timing:
    """Return median and quartiles of at least two runs."""
    low, median, high = quantiles(seconds, n=4, method="inclusive")
    return Timing(median_s=median, low_s=low, high_s=high, repetitions=len(seconds))


def _ratio(seconds: Sequence[float], first: Sequence[float]) -> Ratio:
    low, median, high = quantiles(
        (run / other for run, other in zip(seconds, first, strict=True)), n=4, method="inclusive"
    )
    return Ratio(median=median, low=low, high=high)


def relative_error(answer: Answer, expected: Answer) -> float:
    """Return the largest of ‖a − e‖ / ‖e‖ over the tensors that there are, infinite for one not finite."""
    worst = 0.0 if any(tensor is not None for tensor in answer) else math.inf
    for tensor, wanted in zip(answer, expected, strict=True):
        if tensor is None:
            continue
        if tensor.shape != wanted.shape or not bool(tensor.isfinite().all()):
            return math.inf
        distance = (tensor.to(wanted.dtype) - wanted).norm() / wanted.norm().clamp(min=1e-30)
        worst = max(worst, float(distance))
    return worst


def _checked(
    contender: Contender,
    problem: Problem,
    expected: Answer | None,
    device: torch.device,
    counts_memory: bool,
) -> Entry:
    if contender.absent:
        return Entry(name=contender.name, status=f"absent: {contender.absent}")
    try:
        _prepare(contender)
        answer = contender.run()
        answer = answer if contender.answer is None else contender.answer(answer)
        answer = [answer] if isinstance(answer, torch.Tensor) else answer
        error = (problem.error or relative_error)(answer, expected)
        if not error <= problem.tolerance:
            status = f"wrong: error {error:.1e}, at most {problem.tolerance:.0e} is allowed"
            return Entry(name=contender.name, error=error, status=status)
        del answer
        figures = {}
        if counts_memory:
            _prepare(contender)
            extra_bytes = peak_bytes(contender.run, device) - problem.besides_bytes
            figures["extra MB"] = extra_bytes / 1e6
        return Entry(name=contender.name, error=error, figures=figures)
    except Exception as error:  # of any library: one contender that fails must not end the others
        is_plain = isinstance(error, (RuntimeError, ValueError, TypeError, ImportError, AttributeError))
        text = str(error) if is_plain else f"{type(error).__name__}: {error}"
        first_line = (text.strip() or type(error).__name__).splitlines()[0]
        return Entry(name=contender.name, status=f"failed: {first_line[:160]}")


def _prepare(contender: Contender) -> None:
    if contender.prepare is not None:
        contender.prepare()


class _HostClock:
    """Wall-clock time of runs on the CPU."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def time(self, contender: Contender) -> None:
        _prepare(contender)
        started = time.perf_counter()
        contender.run()
        self._seconds.append(time.perf_counter() - started)

    def seconds(self) -> list[float]:
        """Return the runs since the last call, and forget them."""
        taken, self._seconds = self._seconds, []
        return taken


class _CudaClock:
    """Device time of runs on CUDA: events around the run, the cache overwritten before it."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, contender: Contender) -> None:
        _prepare(contender)
        self._flush.zero_()
        occupy_device(HEAD_START_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        contender.run()
        end.record()
        self._events.append((start, end))

    def seconds(self) -> list[float]:
        """Wait for the device, return the runs since the last call, and forget them."""
        torch.cuda.synchronize()
        taken, self._events = self._events, []
        return [start.elapsed_time(end) / 1e3 for start, end in taken]
