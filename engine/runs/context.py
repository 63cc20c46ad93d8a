"""What surrounds the loop of every command that trains: checkpoints, metrics, trace, watchdog, report."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_rlhf.engine.health.watchdog import watchdog
from glm_rlhf.engine.observe.metrics import WriteMetrics, open_metrics
from glm_rlhf.engine.observe.metrics_file import has_metrics
from glm_rlhf.engine.observe.report import FILE_NAME as REPORT
from glm_rlhf.engine.observe.report import try_write_report
from glm_rlhf.engine.observe.trace import Trace, tracing
from glm_rlhf.engine.runs.checkpoints import UNREPORTED, RunCheckpoints, open_checkpoints, resume
from glm_rlhf.engine.runs.run_folder import record_config
from glm_rlhf.engine.runs.save_notice import log_long_save
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.preemption import Preempted, handle_preemption_signals
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_tensors import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a training loop writes to and resumes from."""

    config: Any
    """Root config of the command."""
    topology: Topology
    """Layout and groups."""
    checkpoints: RunCheckpoints
    """Saves what is due after a step."""
    write: WriteMetrics
    """Takes a step and its metrics; on the main rank it writes them."""
    trace: Trace | None
    """This rank's spans; None where the config asks for none."""
    progress: Mapping[str, Any] | None
    """The progress saved in the checkpoint that the run resumes from; None for a new run."""

    @property
    def first_step(self) -> int:
        """Steps completed before."""
        return 0 if self.progress is None else self.progress["step"]

    @property
    def is_finished(self) -> bool:
        """Whether no step is left to train, and none to report."""
        is_trained = self.progress is not None and self.first_step >= self.config.train.steps
        return is_trained and self.unreported is None

    @property
    def unreported(self) -> dict[str, float] | None:
        """Metrics of the first step, where the run was left during its evaluation; None: they are written."""
        return (self.progress or {}).get(UNREPORTED)


@contextlib.contextmanager
def open_run(
    config: Any,
    states: Mapping[str, AnyTrainingState],
    *,
    identity: Mapping[str, str],
    export: Callable[[Path], None],
    checkpoint: Checkpoint | None,
    topology: Topology,
) -> Iterator[RunContext]:
    """Return, as a context manager, the surroundings of a training loop; every rank enters.

    Models, optimizers and random generators are brought to `checkpoint`; with that the run is accepted, and
    `config.yaml` becomes its config. Where a run is finished already, its last export and its report are made
    if they are missing, and nothing else is opened. `Preempted` ends the block quietly: whoever raises it has
    saved. After a block that ended, also by an error, the report is written.

    Args:
        config: root config of the command.
        states: models in training by name; the first is what a checkpoint is as a model folder.
        identity: fingerprints of what may not change between a run and its resumption, on the main rank.
        export: writes the Hugging Face folder that it is given.
        checkpoint: what to resume from, as `open_run_folder` returned it.
        topology: layout and groups.

    Raises:
        ValueError: the checkpoint is of another run, the run folder cannot be written, or the last save
        failed.
    """
    writes_report = False
    try:
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(
                open_checkpoints(config, states, identity=identity, export=export, topology=topology)
            )
            progress = None if checkpoint is None else resume(checkpoint, checkpoints)
            run = RunContext(
                config=config,
                topology=topology,
                checkpoints=checkpoints,
                write=_write_nothing,
                trace=None,
                progress=progress,
            )
            checkpoints.exports.open(run.first_step, config.train.steps)
            if run.is_finished:
                checkpoints.close_finished(run.first_step)
                writes_report = topology.is_main_rank and not (Path(config.run.output) / REPORT).exists()
                yield run
                return
            checkpoints.export_missed(run.first_step)
            record_config(config, topology)
            write, trace = _open_outputs(run, stack)
            log_long_save(states, topology)
            stack.enter_context(watchdog(config.run.watchdog_s, rank=topology.rank))
            stack.enter_context(handle_preemption_signals())
            writes_report = topology.is_main_rank
            try:
                yield dataclasses.replace(run, write=write, trace=trace)
            except Preempted:
                writes_report = False
    finally:
        if writes_report and has_metrics(config.run.output):
            try_write_report(config.run.output, title=config.run.name)


def _open_outputs(run: RunContext, stack: contextlib.ExitStack) -> tuple[WriteMetrics, Trace | None]:
    """Return what takes the metrics of a step, and this rank's trace if the config asks for one."""
    config, topology = run.config, run.topology
    with raise_on_all_ranks(f"writing to {config.run.output}"):
        write = stack.enter_context(
            open_metrics(
                config.run.output,
                is_owner=topology.is_main_rank,
                uses_tensorboard=config.observe.tensorboard,
                wandb_project=config.observe.wandb,
                run_name=config.run.name,
                config=dataclasses.asdict(config),
                last_step=None if run.progress is None else run.first_step - (run.unreported is not None),
            )
        )
    trace = None
    if config.observe.trace:
        with raise_on_all_ranks("beginning the traces"):
            trace = stack.enter_context(tracing(config.run.output, rank=topology.rank))
    return write, trace


def _write_nothing(_step: int, _metrics: Mapping[str, float | None]) -> None:
    """What a run that is finished writes."""
