"""The command `bench`: every part measured, and one report of it."""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from glm_rlhf.engine.bench.findings import Findings, read_earlier, write_findings
from glm_rlhf.engine.bench.harness import Contender
from glm_rlhf.engine.bench.kernel_rows.table import full_cases, small_cases
from glm_rlhf.engine.bench.machine import description, measured_rates
from glm_rlhf.engine.bench.parts.checkpoint import checkpoint_rows
from glm_rlhf.engine.bench.parts.kernels import measured_case
from glm_rlhf.engine.bench.parts.models import Policy, generation_row, model_rows
from glm_rlhf.engine.bench.parts.ppo import ppo_row
from glm_rlhf.engine.bench.parts.scaling import (
    FILE,
    ScalingPoint,
    launch,
    measure_scaling,
    read_point,
    write_point,
)
from glm_rlhf.engine.bench.rates import Size, rates_on
from glm_rlhf.engine.bench.report import Row, joined
from glm_rlhf.engine.bench.sizes import Sizes, ranks_for, sizes_for
from glm_rlhf.engine.config.bench import PEER_PACKAGES, BenchConfig, BenchSection
from glm_rlhf.engine.config.load import save_config
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.storage.durable_io import replace_text

RATES_FILE = "rates.json"
"""What `plan` takes as `cluster.rates`."""
_OF_RANKS = ("scaling", "rates")
_LONGER = 8
"""Times the budget of a kernel that other rows have."""


def run(config: BenchConfig) -> int:
    """Measure, write `bench.md`, `bench.json`, plots and `rates.json`; 1 where ours was wrong or failed.

    As one process it starts the ranks of scaling and rates itself; under torchrun it measures those two on
    the ranks that there are.

    Raises:
        ValueError: a part that one process measures, under torchrun; an earlier report that is none.
    """
    section, folder = config.bench, Path(config.run.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(section.threads)
    sizes = sizes_for(section, device)
    if int(os.environ.get("RANK") or 0) == 0:
        save_config(config, folder)
    if "WORLD_SIZE" in os.environ:
        _measure_world(section, sizes, folder)
        return 0
    earlier = None if section.earlier is None else read_earlier(Path(section.earlier))
    started = time.monotonic()
    rows: list[Row] = []
    for visit in range(section.visits):
        for index, row in enumerate(_rows(section, sizes, device)):
            if visit:
                rows[index] = joined(rows[index], row)
            else:
                rows.append(row)
            log(f"visit {visit + 1}, {row.row}: {row.what}; {time.monotonic() - started:.0f} s")
    points, failures = _worlds(section, folder)
    findings = Findings(
        machine=description(device),
        rows=rows,
        scaling=points,
        notes=[
            f"model: {sizes.text()}",
            *(_peer_note(peer, device) for peer in section.against),
            f"all rows were measured {section.visits} times, one after another; the range behind a median "
            "reaches from the lowest quartile of any visit to the highest",
            *failures,
            *([f"torch uses {section.threads} thread(s) a rank"] if device.type == "cpu" else []),
        ],
        seconds=time.monotonic() - started,
    )
    sys.stdout.write(write_findings(findings, folder, earlier=earlier))
    return int(bool(failures) or any(row.entries[0].timing is None for row in rows))


def _rows(section: BenchSection, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Yield the rows of the parts that one process measures."""
    budget_s = _LONGER * section.budget_s
    if "kernels" in section.parts:
        rates = measured_rates(device)
        for case in full_cases() if device.type == "cuda" else small_cases():
            yield measured_case(
                case,
                device,
                rates,
                budget_s=section.budget_s,
                command=_command("kernels"),
                keeps=_keeps(section),
            )
    if not {"model", "generation", "ppo", "checkpoint"} & set(section.parts):
        return
    with open_topology(Layout()) as topology:
        if {"model", "generation"} & set(section.parts):
            policy = Policy(sizes, topology, with_transformers="transformers" in section.against)
            if "generation" in section.parts:
                yield generation_row(policy, budget_s=budget_s, command=_command("generation"))
            if "model" in section.parts:
                yield from model_rows(policy, budget_s=budget_s, command=_command("model"))
            del policy
        if "ppo" in section.parts:
            yield ppo_row(sizes, topology, budget_s=budget_s, command=_command("ppo"))
        if "checkpoint" in section.parts:
            yield from checkpoint_rows(sizes, topology, budget_s=budget_s, command=_command("checkpoint"))


def _keeps(section: BenchSection) -> Callable[[Contender], bool]:
    """Return the filter of a kernel's contenders; it keeps ours, eager torch and the peers of `against`."""
    unwanted = tuple(peer for peer in PEER_PACKAGES if peer not in section.against)
    return lambda contender: not contender.name.startswith(unwanted)


def _worlds(section: BenchSection, folder: Path) -> tuple[list[ScalingPoint], list[str]]:
    """Return the results of each world of ranks of this machine, and why some have none.

    The last world leaves the rates too.
    """
    wanted = [part for part in _OF_RANKS if part in section.parts]
    counts = ranks_for(section) if "scaling" in wanted else ranks_for(section)[-1:]
    points, failures = [], []
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for num_ranks in counts if wanted else ():
        parts = [part for part in wanted if part != "rates" or num_ranks == counts[-1]]
        log(f"{' and '.join(parts)} on {num_ranks} ranks")
        settings = [f"bench.parts=[{','.join(parts)}]", f"bench.layers={section.layers}"]
        settings += [f"bench.threads={section.threads}"]
        settings += [] if section.model is None else [f"bench.model={section.model}"]
        world_folder = folder / f"ranks_{num_ranks}"
        try:
            launch(world_folder, num_ranks, settings, threads=section.threads)
        except RuntimeError as error:
            failures.append(" ".join(str(error).split())[:500])
            continue
        if "rates" in parts:
            (world_folder / RATES_FILE).replace(folder / RATES_FILE)
        if "scaling" in parts:
            points.append(read_point(world_folder / FILE))
    return points, failures


def _measure_world(section: BenchSection, sizes: Sizes, folder: Path) -> None:
    others = [part for part in section.parts if part not in _OF_RANKS]
    if others:
        raise ValueError(
            f"under torchrun bench.parts may hold scaling and rates only, not {', '.join(others)}: give "
            "bench.parts=[scaling,rates], or start the command without torchrun"
        )
    with open_topology(Layout()) as topology:
        point = measure_scaling(sizes, topology) if "scaling" in section.parts else None
        rates = None
        if "rates" in section.parts:
            size = Size(
                tokens=sizes.tokens,
                length=sizes.length,
                batch=sizes.num_prompts,
                dtype=sizes.dtype,
                repetitions=3,
            )
            rates = rates_on(topology, sizes.model, size)
        if not topology.is_main_rank:
            return
        if point is not None:
            write_point(point, folder / FILE)
        if rates is not None:
            replace_text(folder / RATES_FILE, json.dumps(asdict(rates), indent=1) + "\n")


def _peer_note(peer: str, device: torch.device) -> str:
    """Return a peer with its version, or that it is missing."""
    package, only_cuda = PEER_PACKAGES[peer]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{peer}: missing; pip install {package}"
    excluded = "; its kernels need CUDA and are excluded" if only_cuda and device.type == "cpu" else ""
    return f"{peer}: {version}{excluded}"


def _command(part: str) -> str:
    return f"glm-rlhf bench bench.parts=[{part}]"
