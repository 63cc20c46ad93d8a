"""Finds the fastest layouts that fit a cluster, or the changes that make one fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from glm_rlhf.engine.cost.hardware import GPUS, Cluster
from glm_rlhf.engine.cost.iteration_time import Estimate, estimate
from glm_rlhf.engine.cost.memory import RankMemory, fullest_rank
from glm_rlhf.engine.cost.workload import Choice, Roles, Workload
from glm_rlhf.parallel.spec.layout import Layout

_TP = (1, 2, 4, 8, 16)
_VPP = (1, 2, 4)
_CP = (1, 2, 4, 8)
_LONG = 8192
"""Sequence length in tokens above which context parallelism is considered."""
_MOST_BATCH_TOKENS = 32768
_AXES = ("tp", "pp", "vpp", "cp")
_MORE_GPUS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes that the user fixed; None: the search chooses."""

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    micro_batch_tokens: int | None = None
    recompute_layers: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """One choice with its memory and time."""

    choice: Choice
    """Layout and micro-batches."""
    memory: RankMemory
    """Memory of the rank with the highest peak."""
    max_batch: int
    """Sequences generated at once per model replica."""
    cache_bytes: int
    """Bytes of the key/value cache per rank."""
    estimate: Estimate
    """Estimated time of an iteration."""

    @property
    def peak_bytes(self) -> int:
        """Peak over all phases, with the key/value cache in generation."""
        phases = dict(self.memory.phases)
        phases["generate"] += self.cache_bytes
        return self.memory.resident + max(phases.values())


class NoFit(ValueError):
    """No layout fits the cluster; the message says what is missing and what to change."""


def search(
    roles: Roles, work: Workload, cluster: Cluster, *, limits: Limits, has_baseline: bool, count: int
) -> list[LayoutPlan]:
    """Return the fastest plans that fit, fastest first, no two with the same tp, pp and cp.

    Args:
        roles: shapes of the models.
        work: workload of an iteration.
        cluster: the machines.
        limits: sizes that the user fixed.
        has_baseline: whether the reference also answers each prompt once.
        count: most plans to return.

    Raises:
        NoFit: no layout fits.
    """
    fitting = _fitting(roles, work, cluster, limits)
    if not fitting:
        raise NoFit(_no_fit_message(roles, work, cluster, limits))
    plans = []
    for choice, memory in fitting:
        max_batch, cache_bytes = _cache(memory, work, choice, cluster)
        times = estimate(roles, work, choice, cluster, num_concurrent=max_batch, has_baseline=has_baseline)
        plans.append(
            LayoutPlan(
                choice=choice, memory=memory, max_batch=max_batch, cache_bytes=cache_bytes, estimate=times
            )
        )
    plans.sort(key=lambda plan: plan.estimate.total.seconds)
    best: dict[tuple[int, int, int], LayoutPlan] = {}
    for plan in plans:
        layout = plan.choice.layout
        best.setdefault((layout.tp, layout.pp, layout.cp), plan)
    return list(best.values())[:count]


def layouts(roles: Roles, work: Workload, num_gpus: int, limits: Limits) -> Iterator[Layout]:
    """Yield each layout that splits all models evenly, divides the GPUs and has a prompt per dp rank."""
    model = roles.policy
    sizes = range(1, min(model.num_layers, num_gpus) + 1)
    for tp in _TP if limits.tp is None else (limits.tp,):
        for pp in sizes if limits.pp is None else (limits.pp,):
            for vpp in _VPP if limits.vpp is None else (limits.vpp,):
                for cp in (_CP if work.longest > _LONG else (1,)) if limits.cp is None else (limits.cp,):
                    if (vpp > 1 and pp == 1) or num_gpus % (tp * pp * cp):
                        continue
                    layout = Layout(tp=tp, pp=pp, vpp=vpp, cp=cp, sequence_parallel=tp > 1)
                    if layout.dp(num_gpus) <= work.num_prompts and _splits(layout, roles):
                        yield layout


def _splits(layout: Layout, roles: Roles) -> bool:
    try:
        for _, model in roles.items:
            layout.check_model(model)
    except ValueError:
        return False
    return True


def _choices(roles: Roles, work: Workload, num_gpus: int, limits: Limits) -> Iterator[list[Choice]]:
    """Yield for each layout its choices, those that are likely faster first."""
    if limits.micro_batch_tokens is not None:
        budgets = [limits.micro_batch_tokens]
    else:
        budgets = [work.longest]
        while budgets[-1] * 2 <= _MOST_BATCH_TOKENS:
            budgets.append(budgets[-1] * 2)
    recomputes = (False, True) if limits.recompute_layers is None else (limits.recompute_layers,)
    for layout in layouts(roles, work, num_gpus, limits):
        yield [
            Choice(layout=layout, micro_batch_tokens=budget, recompute_layers=recompute)
            for recompute in recomputes
            for budget in reversed(budgets)
        ]


_KEPT_BATCHES = 2


def _fitting(
    roles: Roles, work: Workload, cluster: Cluster, limits: Limits
) -> list[tuple[Choice, RankMemory]]:
    """Return for each layout the largest micro-batches that fit, with recomputation only if needed."""
    fitting = []
    for choices in _choices(roles, work, cluster.num_gpus, limits):
        kept: list[tuple[Choice, RankMemory]] = []
        for choice in choices:
            if kept and choice.recompute_layers != kept[0][0].recompute_layers:
                break
            memory = fullest_rank(roles, work, choice, num_gpus=cluster.num_gpus)
            if _fits(memory, work, choice, cluster):
                kept.append((choice, memory))
            if len(kept) == _KEPT_BATCHES:
                break
        fitting += kept
    return fitting


def _fits(memory: RankMemory, work: Workload, choice: Choice, cluster: Cluster) -> bool:
    return _needed_bytes(memory, work, choice) <= cluster.usable_bytes


def _needed_bytes(memory: RankMemory, work: Workload, choice: Choice) -> int:
    """Return the peak bytes with the smallest usable cache: one sequence per pipeline stage."""
    cache = choice.layout.pp * _sequence_pages(work) * memory.cache_page
    return max(memory.peak, memory.resident + memory.phases["generate"] + cache)


def _cache(memory: RankMemory, work: Workload, choice: Choice, cluster: Cluster) -> tuple[int, int]:
    """Return the number of sequences generated at once on a rank, and the bytes of their cache."""
    room = cluster.usable_bytes - memory.resident - memory.phases["generate"]
    sequence_bytes = _sequence_pages(work) * memory.cache_page
    num_sequences = -(-choice.num_sequences(work, cluster.num_gpus) // choice.layout.cp)
    max_batch = max(choice.layout.pp, min(work.max_batch, num_sequences, room // sequence_bytes))
    return max_batch, max_batch * sequence_bytes


def _sequence_pages(work: Workload) -> int:
    """Return the pages that the engine reserves per sequence: one more than it fills, for copies."""
    return -(-work.longest // work.page_size) + 1


def _no_fit_message(roles: Roles, work: Workload, cluster: Cluster, limits: Limits) -> str:
    """Return how much memory is missing, and which single changes make a layout fit."""
    least = _least(roles, work, cluster, limits)
    if least is None:
        fixed = [f"parallel.{axis} {getattr(limits, axis)}" for axis in _AXES if getattr(limits, axis)]
        if fixed and _least(roles, work, cluster, Limits()) is not None:
            return (
                f"no layout with {', '.join(fixed)} divides {cluster.num_gpus} GPUs, splits every model "
                f"evenly and has one of {work.num_prompts} prompts per data-parallel rank: other layouts do, "
                "set some of these keys to null"
            )
        return (
            f"no layout divides {cluster.num_gpus} GPUs, splits every model evenly and has one of "
            f"{work.num_prompts} prompts per data-parallel rank: give more prompts, or change the number of "
            "GPUs"
        )
    choice, memory = least
    layout = choice.layout
    roles_gb = ", ".join(f"{name} {_gb(held.total)}" for name, held in memory.roles.items())
    phase = max(memory.phases, key=memory.phases.__getitem__)
    changes = [text for text, is_enough in _changes(roles, work, cluster, limits) if is_enough]
    fix = "; or ".join(changes) if changes else "no single change that was tried is enough: combine them"
    return (
        f"no layout fits {cluster.num_gpus} GPUs with {_gb(cluster.usable_bytes)} usable memory: the "
        f"smallest ({layout_name(layout, cluster.num_gpus)}, "
        f"layers recomputed: {'yes' if choice.recompute_layers else 'no'}) "
        f"takes {_gb(_needed_bytes(memory, work, choice))} per GPU: {roles_gb}, "
        f"and {_gb(memory.phases[phase])} in the phase {phase}. "
        f"Changes that make it fit: {fix}"
    )


def _changes(roles: Roles, work: Workload, cluster: Cluster, limits: Limits) -> Iterator[tuple[str, bool]]:
    """Yield single changes, and whether a layout fits with them."""
    if limits != Limits():
        yield "let the plan choose the layout", bool(_fitting(roles, work, cluster, Limits()))
    for factor in _MORE_GPUS:
        more = replace(cluster, num_gpus=cluster.num_gpus * factor)
        enough = replace(work, num_prompts=max(work.num_prompts, more.num_gpus))
        if _fitting(roles, enough, more, limits):
            yield f"{more.num_gpus} GPUs", True
            break
    share = cluster.usable_bytes / cluster.gpu.memory_bytes
    larger = sorted(GPUS.items(), key=lambda item: item[1].memory_bytes)
    for name, gpu in larger:
        usable = int(share * gpu.memory_bytes)
        if usable > cluster.usable_bytes and _fitting(
            roles, work, replace(cluster, gpu=gpu, usable_bytes=usable), limits
        ):
            yield f"{name} ({_gb(gpu.memory_bytes)} each)", True
            break
    if roles.reward is not None:
        yield (
            "a reward function instead of the reward model (reward.function)",
            bool(_fitting(replace(roles, reward=None), work, cluster, limits)),
        )
    half = replace(
        work, max_prompt_tokens=work.max_prompt_tokens // 2, max_new_tokens=work.max_new_tokens // 2
    )
    if half.max_prompt_tokens and half.max_new_tokens:
        yield "sequences half as long", bool(_fitting(roles, half, cluster, limits))


def _least(
    roles: Roles, work: Workload, cluster: Cluster, limits: Limits
) -> tuple[Choice, RankMemory] | None:
    """Return the choice that needs the fewest bytes on its fullest rank."""
    candidates = [
        (choices[-1], fullest_rank(roles, work, choices[-1], num_gpus=cluster.num_gpus))
        for choices in _choices(roles, work, cluster.num_gpus, limits)
    ]
    return min(candidates, key=lambda pair: _needed_bytes(pair[1], work, pair[0]), default=None)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def layout_name(layout: Layout, num_gpus: int) -> str:
    """Return a layout as text, data parallelism included."""
    parts = [f"tp {layout.tp}", f"pp {layout.pp}", f"dp {layout.dp(num_gpus)}"]
    parts += [f"cp {layout.cp}"] if layout.cp > 1 else []
    parts += [f"vpp {layout.vpp}"] if layout.vpp > 1 else []
    return " × ".join(parts)
