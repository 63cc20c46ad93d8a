"""The time of a PPO iteration that `plan` predicts, compared with measured small layouts.

    torchrun --standalone --nproc-per-node=2 -m benchmarks.planning.time

The rates are measured on the same ranks just before: on one and two layers, without pipeline or tensor
parallelism. Each time is the fastest of several runs.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness.command import parse
from glm_rlhf.engine.bench.full_length import full_length_work, random_prompts
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.parts.ppo import make_roles
from glm_rlhf.engine.bench.rates import Size, least_s, rates_of
from glm_rlhf.engine.bench.report import facts, table, write_files
from glm_rlhf.engine.bench.sizes import SMALL
from glm_rlhf.engine.cost.hardware import GPUS, Cluster, Rates
from glm_rlhf.engine.cost.iteration_time import Estimate, estimate
from glm_rlhf.engine.cost.workload import Choice, Roles
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.engine.types import Experience, Rollouts
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

_MODEL = replace(SMALL, num_heads=8, head_size=32, vocab_size=2048, max_positions=1024)
_WORK = full_length_work(prompt_tokens=64, new_tokens=32, num_prompts=16, max_step_tokens=2048, itemsize=4)
_BATCH_TOKENS = 2 * _WORK.longest
LAYOUTS = (
    {},
    {"tp": 2},
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"cp": 2},
)
_PHASES = ("generate", "score", "update")


def _choice(axes: dict) -> Choice:
    return Choice(layout=Layout(**axes), micro_batch_tokens=_BATCH_TOKENS, recompute_layers=False)


def measure(axes: dict, *, repetitions: int) -> dict[str, float]:
    """Return seconds of each phase in a layout; every rank calls this, and all get the same."""
    choice = _choice(axes)
    with open_topology(choice.layout) as topology:
        roles = make_roles(topology, model=_MODEL, work=_WORK, choice=choice)
        prompts = random_prompts(_MODEL, _WORK)
        kept: dict[str, Rollouts | Experience] = {}

        def generate() -> None:
            kept["rollouts"] = roles.generate(prompts)

        def score() -> None:
            kept["experience"] = roles.make_experience(kept["rollouts"])

        def update(roles: PPORoles = roles) -> None:
            roles.update(kept["experience"])

        works = {"generate": generate, "score": score, "update": update}
        return {name: least_s(work, topology, repetitions) for name, work in works.items()}


def predict(axes: dict, rates: Rates, num_ranks: int) -> dict[str, float]:
    """Return the prediction of `plan` for the same phases."""
    roles = Roles(policy=_MODEL, critic=_MODEL, reference=_MODEL, reward=_MODEL)
    cluster = Cluster(
        gpu=GPUS["h100"], num_gpus=num_ranks, gpus_per_node=num_ranks, rates=rates, usable_bytes=1
    )
    predicted: Estimate = estimate(
        roles, _WORK, _choice(axes), cluster, num_concurrent=_WORK.max_batch, has_baseline=False
    )
    seconds = {name: phase.seconds for name, phase in predicted.phases.items()}
    update = seconds["train policy"] + seconds["train critic"]
    return {"generate": seconds["generate"], "score": seconds["score"], "update": update}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure rates and every layout; the first rank writes the report."""
    options = parse(
        arguments,
        doc=__doc__,
        options={"repetitions": (5, "runs of which the fastest counts")},
        out="plan_time_cpu",
    )
    dist.init_process_group("gloo")
    size = Size(
        tokens=_BATCH_TOKENS,
        length=_WORK.longest,
        batch=8,
        dtype=torch.float32,
        repetitions=options.repetitions,
    )
    rates = rates_of(_MODEL, size)
    num_ranks = dist.get_world_size()
    rows = []
    for axes in LAYOUTS:
        measured = measure(axes, repetitions=options.repetitions)
        predicted = predict(axes, rates, num_ranks)
        error = sum(predicted.values()) / sum(measured.values()) - 1
        rows.append({"layout": axes, "measured": measured, "predicted": predicted, "error": error})
    if os.environ["RANK"] == "0":
        _write(options.out, rates, rows, num_ranks)
    dist.destroy_process_group()


def _write(stem: Path, rates: Rates, rows: list[dict], num_ranks: int) -> None:
    machine = description(torch.device("cpu"))
    num_near = sum(abs(row["error"]) <= 0.2 for row in rows)
    lines = [
        "# Time: what `plan` predicts and what is measured",
        "",
        f"In {num_near} of {len(rows)} layouts the predicted iteration is within 20 % of the measured one. "
        f"{num_ranks} gloo ranks, each on a core; 4 layers, hidden 256, four roles, {_WORK.num_prompts} "
        f"sequences of {_WORK.longest} tokens; the rates were measured in the same run. Seconds are the "
        "fastest of several runs, each measured / predicted.",
        "",
        *facts(machine),
        "",
        *table(
            ("layout", *(f"{name} s" for name in _PHASES), "iteration s", "error"),
            [_cells(row, num_ranks) for row in rows],
        ),
    ]
    write_files(stem, "\n".join(lines) + "\n", {"machine": machine, "rates": asdict(rates), "rows": rows})


def _cells(row: dict, num_ranks: int) -> tuple[str, ...]:
    name = ", ".join(f"{axis} {size}" for axis, size in row["layout"].items()) or f"dp {num_ranks}"
    pairs = (f"{row['measured'][phase]:.3f} / {row['predicted'][phase]:.3f}" for phase in _PHASES)
    total = " / ".join(f"{sum(row[kind].values()):.3f}" for kind in ("measured", "predicted"))
    return name, *pairs, total, f"{row['error']:+.0%}"


if __name__ == "__main__":
    main()
