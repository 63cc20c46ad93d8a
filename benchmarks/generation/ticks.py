"""How often a pipeline stage has no group to compute while answers are generated."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.generation.mixes import MAX_BATCH, Mix, mixes, phase_of, random_model, requests_of
from benchmarks.harness.fresh_process import in_fresh_process
from glm_rlhf.engine.bench.harness import Entry
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.parallel.inference.pipelined_loop import TickCount
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

STAGES = (2, 4)
TARGET = 0.05
_STEADY, _WHOLE, _TURNS = "idle %, steady", "idle %, whole run", "turns"


def tick_rows() -> list[Row]:
    """Return one row a mix and number of stages, an entry a stage; each stage is a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_model().save_pretrained(folder)
        for num_stages in STAGES:
            with tempfile.TemporaryDirectory() as meeting, ThreadPoolExecutor(num_stages) as pool:
                places = [(stage, num_stages, folder, f"{meeting}/store") for stage in range(num_stages)]
                by_stage = list(pool.map(lambda topology: in_fresh_process(_stage_ticks, *topology), places))
            for number, mix in enumerate(_mixes()):
                rows.append(
                    Row(
                        row=f"pipeline of {num_stages}",
                        what=f"{mix.name}: idle turns",
                        shape=f"{num_stages} groups, at most {MAX_BATCH} sequences at once",
                        command="python -m benchmarks.generation.answers",
                        entries=[
                            Entry(name=f"stage {stage}", figures=ticks[number])
                            for stage, ticks in enumerate(by_stage)
                        ],
                    )
                )
    return rows


def tick_verdict(rows: Sequence[Row]) -> str:
    """Return what the rows say about the target, in one sentence."""
    worst = max(entry.figures[_STEADY] for row in rows for entry in row.entries)
    judged = "met" if worst <= 100 * TARGET else "missed"
    return (
        f"Idle turns of a stage, pipelines of {' and '.join(map(str, STAGES))}: at most {worst:.1f} % in the "
        f"steady state, target {TARGET:.0%} ({judged})."
    )


def _mixes() -> list[Mix]:
    """Return the mixes in which prompts wait."""
    return [mix for mix in mixes() if len(mix.prompts) > MAX_BATCH]


def _stage_ticks(rank: int, num_stages: int, folder: str, store: str) -> list[dict[str, float]]:
    """Return one stage's figures of every mix; the other stages run beside it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=num_stages)
    figures = []
    with open_topology(Layout(pp=num_stages)) as topology:
        chunks, _ = load_model(folder, topology, dtype=torch.float32)
        for mix in _mixes():
            requests = requests_of(mix, chunks, topology)
            with phase_of(requests, chunks, topology) as phase:
                steady, num_left = TickCount(), len(requests)
                for _ in phase.run(requests, SamplingSettings(temperature=mix.temperature)):
                    num_left -= 1
                    if num_left >= MAX_BATCH:  # others wait for the place that has become free
                        steady = TickCount(busy=phase.ticks.busy, idle=phase.ticks.idle)
            figures.append(
                {
                    _TURNS: phase.ticks.busy + phase.ticks.idle,
                    _STEADY: 100 * steady.idle_fraction,
                    _WHOLE: 100 * phase.ticks.idle_fraction,
                }
            )
    dist.destroy_process_group()
    return figures
