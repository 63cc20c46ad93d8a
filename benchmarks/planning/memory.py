"""The memory that `plan` predicts, compared with that of the engine's steps, counted storage by storage.

    python -m benchmarks.planning.memory

One process plays one rank of a world whose collectives do nothing: each tensor that the rank would hold is
made and counted, and no other rank is needed. Messages of other ranks hold arbitrary numbers, so that no
result is of use, and generation is counted only where a rank holds a whole model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from benchmarks.harness.command import parse
from benchmarks.harness.one_rank_world import world_of_one_rank
from benchmarks.planning.live_storages import live_peak_bytes
from benchmarks.training.random_experience import random_experience
from glm_rlhf.engine.bench.full_length import full_length_work, random_prompts
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.parts.ppo import make_roles
from glm_rlhf.engine.bench.report import facts, table, write_files
from glm_rlhf.engine.bench.sizes import SMALL
from glm_rlhf.engine.cost.activations import CPU
from glm_rlhf.engine.cost.memory import RankMemory, rank_memory
from glm_rlhf.engine.cost.workload import Choice, Roles, Workload
from glm_rlhf.engine.rl.mini_batches import learners, mini_batches
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.engine.training.step import take_step
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.optim.training_state import TrainingState
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig

WORLD_SIZE = 4
_HEAD = (
    "configuration",
    "rank",
    "held all the time MB, counted / predicted",
    "fullest phase",
    "peak MB, counted / predicted",
    "error",
)
_MODEL = replace(
    SMALL, hidden_size=128, num_heads=8, head_size=16, ffn_size=352, vocab_size=1024, max_positions=1024
)
_WORK = replace(
    full_length_work(prompt_tokens=128, new_tokens=32, num_prompts=16, max_step_tokens=1024, itemsize=4),
    num_samples=2,
    max_batch=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """One tiny run on `WORLD_SIZE` ranks."""

    axes: dict = field(default_factory=dict)
    """Of the layout."""
    changes: dict = field(default_factory=dict)
    """Fields of the model's shape that are different."""
    itemsize: int = 4
    """Bytes of a weight: 4 for fp32, 2 for bf16."""
    recomputes: bool = False
    """Whether backward runs each layer again."""

    @property
    def model(self) -> GLMConfig:
        """Shape of all roles."""
        return replace(_MODEL, **self.changes)

    @property
    def work(self) -> Workload:
        """The iteration; every sequence has the same length."""
        return replace(_WORK, itemsize=self.itemsize)

    @property
    def choice(self) -> Choice:
        """The choice of a plan: four sequences per micro-batch."""
        return Choice(
            layout=Layout(**self.axes),
            micro_batch_tokens=4 * _WORK.longest,
            recompute_layers=self.recomputes,
        )

    @property
    def name(self) -> str:
        """For tables."""
        sizes = {axis: size for axis, size in self.axes.items() if axis != "sequence_parallel"}
        sizes["dp"] = self.choice.layout.dp(WORLD_SIZE)
        parts = [" × ".join(f"{axis} {size}" for axis, size in sizes.items())]
        parts += ["sequence parallel"] if "sequence_parallel" in self.axes else []
        parts += ["layers run again"] if self.recomputes else []
        return ", ".join([*parts, self.model.family, "fp32" if self.itemsize == 4 else "bf16"])


CASES = (
    MemoryCase(),
    MemoryCase(itemsize=2),
    MemoryCase(recomputes=True),
    MemoryCase(axes={"tp": 2}, changes={"family": "glm4", "has_sandwich_norms": True}),
    MemoryCase(axes={"tp": 2, "sequence_parallel": True}, itemsize=2, recomputes=True),
    MemoryCase(axes={"tp": 4, "sequence_parallel": True}),
    MemoryCase(axes={"pp": 2}),
    MemoryCase(axes={"pp": 4}, changes={"has_qkv_bias": False}),
    MemoryCase(axes={"pp": 2, "vpp": 2}),
    MemoryCase(axes={"tp": 2, "pp": 2}, itemsize=2),
    MemoryCase(axes={"cp": 2}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Bytes on one rank."""

    weights: dict[str, int]
    """By role."""
    gradients: dict[str, int]
    """By trained role."""
    optimizer: dict[str, int]
    """By trained role."""
    phases: dict[str, int]
    """The most that each phase holds at once beside these; `start` may hold less than they take later."""

    @property
    def resident(self) -> int:
        """Bytes held all the time."""
        return sum(sum(part.values()) for part in (self.weights, self.gradients, self.optimizer))

    @property
    def peak(self) -> int:
        """The fullest moment of those that were counted."""
        return self.resident + max(self.phases.values())


def predict(case: MemoryCase, *, stage: int) -> RankMemory:
    """Return what `plan` says of a rank of that stage, for the kernels of a CPU."""
    roles = Roles(policy=case.model, critic=case.model, reference=case.model, reward=case.model)
    return rank_memory(roles, case.work, case.choice, num_gpus=WORLD_SIZE, stage=stage, kernels=CPU)


def predicted_phases(case: MemoryCase, memory: RankMemory) -> dict[str, int]:
    """Return its phases with the key/value cache that the engine takes for `max_batch`."""
    pages = case.work.max_batch * (-(-case.work.longest // case.work.page_size) + 1)
    return memory.phases | {"generate": memory.phases["generate"] + pages * memory.cache_page}


def count(case: MemoryCase, *, rank: int) -> Counted:
    """Return what rank `rank` holds in the real engine's steps; no world may exist in this process."""
    with world_of_one_rank(rank, WORLD_SIZE), open_topology(case.choice.layout) as topology:
        made: list[PPORoles] = []
        start = live_peak_bytes(
            lambda: made.append(make_roles(topology, model=case.model, work=case.work, choice=case.choice))
        )
        roles = made[0]
        trained = roles.states
        for state in trained.values():  # the first step makes the moments
            state.zero_grad()
            state.optimizer.prepare_grads()
            state.optimizer.step_with_ready_grads()
        models = roles.models
        held = Counted(
            weights={
                role: _bytes(p for c in chunks for p in c.parameters()) for role, chunks in models.items()
            },
            gradients={
                role: _bytes(p.main_grad for c in state.chunks for p in c.parameters())
                for role, state in trained.items()
            },
            optimizer={role: _optimizer_bytes(state) for role, state in trained.items()},
            phases={},
        )
        phases = {"start": start - held.resident}
        if case.choice.layout.num_model_ranks == 1:
            phases |= _count_rollout(case, roles)
        return replace(held, phases=phases | _count_training(case, roles, topology))


def _count_rollout(case: MemoryCase, roles: PPORoles) -> dict[str, int]:
    prompts = random_prompts(case.model, case.work)
    rollouts: list[Rollouts] = []
    generate = live_peak_bytes(lambda: rollouts.append(roles.generate(prompts)))
    return {"generate": generate, "score": live_peak_bytes(lambda: roles.make_experience(rollouts[0]))}


def _count_training(case: MemoryCase, roles: PPORoles, topology: Topology) -> dict[str, int]:
    work = case.work
    experience = random_experience(
        case.choice.num_sequences(work, WORLD_SIZE),
        length=work.longest,
        prompt_length=work.max_prompt_tokens,
        vocab_size=case.model.vocab_size,
        num_global=work.num_sequences,
    )
    (part,) = mini_batches(
        experience, roles.algorithm, micro_batch_tokens=roles.micro_batch_tokens, seed=1, topology=topology
    )
    of_roles = learners(roles.states, experience, part, roles.algorithm)
    schedules = {f"train {role}": [of_roles[role]] for role in ("policy", "critic")}
    if topology.layout.pp > 1:
        schedules = {"train": list(of_roles.values())}
    return {
        name: live_peak_bytes(partial(take_step, own, topology=topology, dtype=torch.float32))
        for name, own in schedules.items()
    }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _optimizer_bytes(state: TrainingState) -> int:
    """Return the bytes of moments, and of fp32 weights that are no view of the model's."""
    weights = {p.untyped_storage().data_ptr() for chunk in state.chunks for p in chunk.parameters()}
    tensors: list[torch.Tensor] = []
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        inner = optimizer.optimizer
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += [
            t for entry in inner.state.values() for t in entry.values() if torch.is_tensor(t) and t.dim()
        ]
    return _bytes(t for t in tensors if t.untyped_storage().data_ptr() not in weights)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count every case on the first and on the last rank, and write the report."""
    out = parse(arguments, doc=__doc__, options={}, out="plan_memory_cpu").out
    rows = [_row(case, rank) for case in CASES for rank in _ranks(case)]
    machine = description(torch.device("cpu"))
    worst = max(abs(row["error"]) for row in rows)
    lines = [
        "# Memory: what `plan` predicts and what is counted",
        "",
        f"The largest error of a peak is {worst:.1%}, of {len(rows)} ranks in {len(CASES)} configurations: "
        "4 layers, hidden 128, ffn 352, vocabulary 1024, four roles, four sequences of 160 tokens per "
        "micro-batch. A peak is weights, gradients and optimizer of all roles, and the fullest phase. "
        "Counted: storages alive after each operation of the engine's own steps, one process a rank, "
        "collectives that do nothing. On a CPU: the kernels of a GPU hold other temporaries, which was not "
        "counted.",
        "",
        *facts(machine),
        "",
        *table(_HEAD, map(_cells, rows)),
    ]
    write_files(out, "\n".join(lines) + "\n", {"machine": machine, "rows": rows})


def _ranks(case: MemoryCase) -> tuple[int, ...]:
    """Return a rank of the first and of the last stage."""
    return (0,) if case.choice.layout.pp == 1 else (0, WORLD_SIZE - 1)


def _row(case: MemoryCase, rank: int) -> dict:
    counted = count(case, rank=rank)
    memory = predict(case, stage=0 if rank == 0 else case.choice.layout.pp - 1)
    phases = {name: predicted_phases(case, memory)[name] for name in counted.phases}
    peak = memory.resident + max(phases.values())
    return {
        "case": case.name,
        "rank": rank,
        "resident": {"counted": counted.resident, "predicted": memory.resident},
        "phases": {name: {"counted": counted.phases[name], "predicted": phases[name]} for name in phases},
        "peak": {"counted": counted.peak, "predicted": peak},
        "error": peak / counted.peak - 1,
    }


def _cells(row: dict) -> tuple[str, ...]:
    fullest = max(row["phases"], key=lambda name: row["phases"][name]["counted"])
    resident, peak = (
        f"{row[key]['counted'] / 1e6:.2f} / {row[key]['predicted'] / 1e6:.2f}" for key in ("resident", "peak")
    )
    return row["case"], str(row["rank"]), resident, fullest, peak, f"{row['error']:+.1%}"


if __name__ == "__main__":
    main()
