"""Checkpoints of a tiny model in training, for tests of their readers and writers."""

import contextlib
from pathlib import Path

import torch
from tiny_training import Case, make_batches, make_chunks, train_step

from glm_rlhf.parallel.checkpoint.save import CheckpointWriter
from glm_rlhf.parallel.megatron_compat.rng_state import random_state
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

CASE = Case(settings=AdamSettings(lr=1e-2), changes={"num_layers": 2})
EXTRA_FILES = {"config.json": b'{"model_type": "glm"}', "tokenizer_config.json": b"{}"}
OPTIONS = {"keep_last": 2, "extra_files": EXTRA_FILES, "config": {"run": {"seed": 7}}}


class TinyRun:
    """A model in training on this rank, and the writer of its checkpoints."""

    def __init__(self, topology, writer: CheckpointWriter) -> None:
        self.topology, self.writer = topology, writer
        self.state = TrainingState(make_chunks(CASE, topology), CASE.settings, topology=topology)

    def step(self) -> None:
        """Change every weight."""
        mine = make_batches(CASE, self.topology)[self.topology.dp_rank :: self.topology.dp]
        train_step(CASE, self.state, mine, self.topology)
        assert self.state.step().is_applied

    def save(self, step: int, writer: CheckpointWriter | None = None) -> None:
        """Save under a step's number."""
        (writer or self.writer).save(
            step, {"policy": self.state}, state={"step": step}, rank_tensors=random_state()
        )


@contextlib.contextmanager
def tiny_run(folder: Path, axes: dict | None = None, **options):
    """Enter a layout with a run that saves into `folder`."""
    torch.manual_seed(3)
    with (
        open_topology(Layout(**(axes or {}))) as topology,
        CheckpointWriter(folder, topology=topology, **(OPTIONS | options)) as writer,
    ):
        yield TinyRun(topology, writer)


def save_steps(folder: Path, axes: dict, steps: list[int]) -> None:
    """Write checkpoints after one update each; called on every rank."""
    with tiny_run(folder, axes) as run:
        for step in steps:
            run.step()
            run.save(step)
