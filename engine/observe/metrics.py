"""Writes the metrics of each step: to `metrics.jsonl`, TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_rlhf.engine.observe.best_effort import GrowingFile, without_failing
from glm_rlhf.engine.observe.metrics_file import FILE_NAME, read_metrics
from glm_rlhf.engine.observe.tensorboard_files import cut_events
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.storage.durable_io import replace_text

WriteMetrics = Callable[[int, Mapping[str, float | None]], None]
"""Takes a step and its metrics by name; None: undefined at that step."""


@contextlib.contextmanager
def open_metrics(
    folder: str | Path,
    *,
    is_owner: bool,
    uses_tensorboard: bool = True,
    wandb_project: str | None = None,
    run_name: str = "",
    config: Mapping[str, Any] | None = None,
    last_step: int | None = None,
) -> Iterator[WriteMetrics]:
    """Return, as a context manager, a function that writes the metrics of one step.

    A line of `<folder>/metrics.jsonl` is `{"step": n, name: number, …}`, written when the function returns.
    NaN, Inf and None are null there and omitted elsewhere. A new run replaces the files of an earlier one; a
    resumed one removes what lies after the step that it resumes from, so that no step is there twice. A disk
    that is full later is logged, and does not end the run: lines wait until they can be written, TensorBoard
    ends.

    Args:
        folder: of the run; created if missing.
        is_owner: whether this process writes; on other ranks the function does nothing.
        uses_tensorboard: also write `<folder>/tensorboard/`.
        wandb_project: also write to this Weights & Biases project; None: do not.
        run_name: name of the run in Weights & Biases.
        config: config of the run, stored in Weights & Biases.
        last_step: of a resumed run: lines up to this step are kept; None: a new run.

    Raises:
        ValueError: `wandb_project` is set but wandb is not installed, or `metrics.jsonl` is no file.
        OSError: the folder cannot be created or written.
    """
    if not is_owner:
        yield _write_nothing
        return
    if wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"observe.wandb is {wandb_project!r}, but wandb is not installed: run pip install wandb, "
            "or set it to null"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if last_step is not None:
            _keep_lines(folder / FILE_NAME, last_step)
        elif os.path.lexists(folder / FILE_NAME) and not (folder / FILE_NAME).is_file():
            raise ValueError(f"{folder / FILE_NAME} is not a regular file: remove it")
        file = GrowingFile(folder / FILE_NAME, is_new=last_step is None)
        stack.callback(file.close)
        sinks: list[Callable[[int, dict[str, float]], None]] = []
        if uses_tensorboard:
            sinks.append(_tensorboard(folder / "tensorboard", stack, last_step))
        if wandb_project is not None:
            sinks.append(_wandb(wandb_project, run_name, config, folder, stack))

        def write(step: int, metrics: Mapping[str, float | None]) -> None:
            numbers = {name: _finite(number) for name, number in metrics.items()}
            file.append(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
            known = {name: number for name, number in numbers.items() if number is not None}
            for sink in sinks:
                sink(step, known)

        yield write


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _write_nothing(_step: int, _metrics: Mapping[str, float | None]) -> None:
    """Do nothing: on ranks that own no file."""


def _keep_lines(path: Path, last_step: int) -> None:
    """Remove lines after `last_step`, and those that are none of a step, by one replacement of the file."""
    by_step, num_others = read_metrics(path)
    kept = [json.dumps(values) + "\n" for step, values in by_step.items() if step <= last_step]
    replace_text(path, "".join(kept))
    if num_others:
        log(f"{path}: {num_others} lines are no metrics of a step and were removed")


def _tensorboard(
    folder: Path, stack: contextlib.ExitStack, last_step: int | None
) -> Callable[[int, dict[str, float]], None]:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the owner needs it

    stack.enter_context(_quiet_writer_thread())
    cut_events(folder, last_step)
    writer = SummaryWriter(str(folder), purge_step=None if last_step is None else last_step + 1)
    is_failing = False

    def write(step: int, numbers: dict[str, float]) -> None:
        nonlocal is_failing
        if is_failing:
            return
        try:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
        except OSError as error:  # of its thread, which has ended
            is_failing = True
            log(f"{folder}: {error.strerror}; TensorBoard gets nothing more, the run continues")

    def close() -> None:
        with contextlib.suppress(OSError) if is_failing else without_failing(folder):
            writer.close()

    stack.callback(close)
    return write


@contextlib.contextmanager
def _quiet_writer_thread() -> Iterator[None]:
    """Print no traceback where TensorBoard's thread ends with an OSError: its caller gets and logs it."""
    original = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        is_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(args.exc_value, OSError)):
            original(args)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = original


def _wandb(
    project: str,
    run_name: str,
    config: Mapping[str, Any] | None,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Callable[[int, dict[str, float]], None]:
    import wandb

    run = wandb.init(project=project, name=run_name or None, config=dict(config or {}), dir=str(folder))
    stack.callback(run.finish)

    def write(step: int, numbers: dict[str, float]) -> None:
        run.log(numbers, step=step)

    return write
