"""How often a pipeline stage has no group to compute while answers are generated."""

import tempfile
from collections.abc import Sequence

import torch

from benchmarks.generation.mixes import MAX_BATCH, Mix, mixes, phase_of, random_model, requests_of
from benchmarks.harness.stages import on_stages
from glm_rlhf.engine.bench.harness import Entry
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.parallel.inference.pipelined_loop import TickCount
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.weights.load import load_model

STAGES = (2, 4)
TARGET = 0.05
_STEADY, _WHOLE, _TURNS = "idle %, steady", "idle %, whole run", "turns"


def tick_rows() -> list[Row]:
    """Return one row per mix and number of stages, an entry per stage."""
    with tempfile.TemporaryDirectory() as folder:
        random_model().save_pretrained(folder)
        by_stage = {num_stages: on_stages(_stage_ticks, num_stages, folder) for num_stages in STAGES}
    return [
        Row(
            row=f"pipeline of {num_stages}",
            what=f"{mix.name}: idle turns",
            shape=f"{num_stages} groups, at most {MAX_BATCH} sequences at once",
            command="python -m benchmarks.generation.answers",
            entries=[
                Entry(name=f"stage {stage}", figures=ticks[index]) for stage, ticks in enumerate(by_mix)
            ],
        )
        for num_stages, by_mix in by_stage.items()
        for index, mix in enumerate(_mixes())
    ]


def is_tick_row(row: Row) -> bool:
    """Return whether a row counts idle turns."""
    return any(_STEADY in entry.figures for entry in row.entries)


def tick_verdict(rows: Sequence[Row]) -> str:
    """Return the verdict of the rows on the target, in one sentence."""
    worst = max(entry.figures[_STEADY] for row in rows for entry in row.entries)
    judged = "met" if worst <= 100 * TARGET else "missed"
    return (
        f"Idle turns of a stage, pipelines of {' and '.join(map(str, STAGES))}: at most {worst:.1f} % in the "
        f"steady state, target {TARGET:.0%} ({judged})."
    )


def _mixes() -> list[Mix]:
    """Return the mixes in which prompts wait."""
    return [mix for mix in mixes() if len(mix.prompts) > MAX_BATCH]


def _stage_ticks(topology: Topology, folder: str) -> list[dict[str, float]]:
    """Return one stage's figures of every mix; the other stages run beside it."""
    figures = []
    chunks, _ = load_model(folder, topology, dtype=torch.float32)
    for mix in _mixes():
        requests = requests_of(mix, chunks, topology)
        with phase_of(requests, chunks, topology) as phase:
            steady, num_left = TickCount(), len(requests)
            for _ in phase.run(requests, SamplingSettings(temperature=mix.temperature)):
                num_left -= 1
                if num_left >= MAX_BATCH:  # others wait for the slot that has become free
                    steady = TickCount(busy=phase.ticks.busy, idle=phase.ticks.idle)
        figures.append(
            {
                _TURNS: phase.ticks.busy + phase.ticks.idle,
                _STEADY: 100 * steady.idle_fraction,
                _WHOLE: 100 * phase.ticks.idle_fraction,
            }
        )
    return figures
