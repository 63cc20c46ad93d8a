"""Optimizer steps of policy and critic in one pipeline schedule and in a schedule each, in turns.

python -m benchmarks.training.joint_update
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.generation.mixes import SHAPE, random_model
from benchmarks.harness.command import Benchmark, errors_exceed
from benchmarks.harness.peer_model import shape_text
from benchmarks.harness.stages import on_stages
from benchmarks.training.random_experience import random_experience
from glm_rlhf.engine.bench.harness import Entry, summary
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.config.rl import PPOSection
from glm_rlhf.engine.rl.algorithms.ppo import PPO
from glm_rlhf.engine.rl.mini_batches import learners, mini_batches
from glm_rlhf.engine.training.loss import Learner
from glm_rlhf.engine.training.step import take_step
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState, training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.spans import WAIT, recording
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.weights.load import load_model

TOGETHER, APART = "one schedule", "a schedule each"
_STAGES = 2
_LENGTH, _PROMPT = 512, 128  # tokens of a sequence (a micro-batch) and of its prompt
_WARM_UP = 2  # untimed steps of each contender
Steps = Callable[[], list[float]]


def measure(options: Namespace) -> list[Row]:
    """Return a row per number of micro-batches."""
    with tempfile.TemporaryDirectory() as folder:
        random_model().save_pretrained(folder)
        rows, *_ = on_stages(rows_of, _STAGES, folder, options.steps, options.micro_batches)
    return rows


def rows_of(topology: Topology, folder: str, num_steps: int, counts: Sequence[int]) -> list[Row]:
    """Return the rows, the same on every rank; the others run beside it."""
    load = partial(load_model, folder, topology, dtype=torch.float32, seed=7)
    still = AdamSettings(lr=1e-12)  # so that both contenders have the same gradients
    policy = training_state(load()[0], still, topology=topology)
    critic = training_state(load(role="critic")[0], still, topology=topology)
    return [_row(count, policy, critic, num_steps, topology) for count in counts]


def _row(
    count: int, policy: AnyTrainingState, critic: AnyTrainingState, num_steps: int, topology: Topology
) -> Row:
    """Time steps of both in turns, each from a barrier to the last rank's end."""
    experience = random_experience(
        count,
        length=_LENGTH,
        prompt_length=_PROMPT,
        vocab_size=SHAPE["vocab_size"],
        num_global=count,
    )
    ppo = PPO(PPOSection())
    (part,) = mini_batches(experience, ppo, micro_batch_tokens=_LENGTH, seed=1, topology=topology)
    states = {"policy": policy, "critic": critic}
    both = list(learners(states, experience, part, ppo).values())
    contenders: dict[str, Steps] = {
        TOGETHER: partial(_steps, [both], topology),
        APART: partial(_steps, [[one] for one in both], topology),
    }
    seconds, idle = ({name: [] for name in contenders} for _ in range(2))
    norms: dict[str, list[float]] = {}
    for number in range(_WARM_UP + num_steps):
        for name in list(contenders) if number % 2 else reversed(contenders):
            took_s, waited_s, norms[name] = _timed(contenders[name])
            if number >= _WARM_UP:
                seconds[name].append(took_s)
                idle[name].append(waited_s / took_s)
    return Row(
        row=f"{count} micro-batches",
        what=f"an optimizer step of policy and critic, {count} micro-batches each",
        shape=f"pp {_STAGES}, micro-batches of {_LENGTH} tokens, fp32",
        command="python -m benchmarks.training.joint_update",
        entries=[
            Entry(
                name=name,
                timing=summary(seconds[name]),
                error=max(abs(a / b - 1) for a, b in zip(norms[name], norms[APART], strict=True)),
                figures={"idle %": 100 * median(idle[name])},
            )
            for name in contenders
        ],
    )


def _steps(groups: Sequence[Sequence[Learner]], topology: Topology) -> list[float]:
    """Return the gradient norms of a step of all learners, each group's in one schedule."""
    results = [take_step(group, topology=topology, dtype=torch.float32) for group in groups]
    return [role.grad_norm for result in results for role in result.roles]


def _timed(steps: Steps) -> tuple[float, float, list[float]]:
    """Return the slowest rank's seconds, the mean rank's seconds of waits, and the norms."""
    waits: list[float] = []

    def record(name: str, start: float, end: float) -> None:
        if name == WAIT:
            waits.append(end - start)

    dist.barrier()
    with recording(record):
        start = time.perf_counter()
        norms = steps()
        took_s = time.perf_counter() - start
    slowest = torch.tensor(took_s, dtype=torch.float64)
    waited = torch.tensor(sum(waits) / _STAGES, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(waited)
    return float(slowest), float(waited), norms


def _verdict(rows: Sequence[Row]) -> str:
    """Return the verdict of each row, in one sentence."""
    said = []
    for row in rows:
        together, apart = row.entries
        a, b = apart.timing.median_s, together.timing.median_s
        said.append(
            f"{row.row}: {a * 1e3:.0f} → {b * 1e3:.0f} ms ({a / b:.2f} ×), idle "
            f"{apart.figures['idle %']:.0f} → {together.figures['idle %']:.0f} %"
        )
    return "; ".join(said) + "."


BENCHMARK = Benchmark(
    doc=__doc__,
    name="joint_update_cpu",
    title="Policy and critic in one pipeline schedule, CPU",
    options={
        "steps": (20, "of each contender in a row"),
        "micro_batches": ([1, 2, 4], "of each role per step"),
    },
    measure=measure,
    verdict=_verdict,
    claim=lambda verdict: (
        "A step in which the micro-batches of policy and critic share a schedule, against one in which "
        f"each has its own, medians: {verdict}"
    ),
    notes=(
        f"both models: GLM of {shape_text(SHAPE)}; random weights",
        "two stages without other axes, one thread a rank; optimizer steps are in the time; with stages "
        "equally busy and m micro-batches a role, 1 / (m + 1) of a schedule each would be idle, and "
        "1 / (2 m + 1) of the joint one",
        "`idle` is the mean over ranks of the share of a step in which the host waits in "
        "torch.distributed, transfer included; `error` the relative difference of gradient norms",
    ),
    fails=errors_exceed(1e-5),
)

if __name__ == "__main__":
    BENCHMARK.run()
