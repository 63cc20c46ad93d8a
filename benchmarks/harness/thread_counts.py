"""The same rows at several thread counts, each of them in a process of its own."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from benchmarks.harness.command import Options
from benchmarks.harness.fresh_process import in_fresh_process
from glm_rlhf.engine.bench.report import Row


def thread_options(*, budget_s: float) -> Options:
    """Return the options `--threads` and `--budget-s`, the latter's default given."""
    return {"threads": ([1, 2], "thread counts"), "budget_s": (budget_s, "seconds of timed runs per row")}


def at_thread_counts(measure_rows: Callable[[int, float], list[Row]]) -> Callable[[Namespace], list[Row]]:
    """Return the function of options that calls `measure_rows(threads, budget_s)` at each thread count."""

    def measure(options: Namespace) -> list[Row]:
        rows = []
        for threads in options.threads:
            rows += with_threads(threads, measure_rows, threads, options.budget_s)
        return rows

    return measure


def with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)` from a fresh process with so many threads, on the CPU."""
    environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return in_fresh_process(function, *arguments, environment=environment)


def threads_text(threads: int) -> str:
    """Return `1 thread`, `2 threads` and so on."""
    return f"{threads} thread{'s' * (threads > 1)}"
