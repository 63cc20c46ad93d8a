"""Which layouts fit a cluster, and which of them are fastest; what to change where none fits."""

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
"""Tokens of a sequence above which context parallelism is looked at."""
_MOST_BATCH_TOKENS = 32768
_AXES = ("tp", "pp", "vpp", "cp")
_MORE_GPUS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user has decided; None leaves it to the search."""

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    micro_batch_tokens: int | None = None
    recompute_layers: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """One choice with what it takes."""

    choice: Choice
    """Layout and micro-batches."""
    memory: RankMemory
    """Of the fullest rank."""
    max_batch: int
    """Sequences that generate at once on a copy of the model."""
    cache_bytes: int
    """Of the key/value cache a rank."""
    estimate: Estimate
    """Seconds of an iteration."""

    @property
    def peak_bytes(self) -> int:
        """The fullest moment, the cache in its phase."""
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
        work: of an iteration.
        cluster: what it runs on.
        limits: what is decided already.
        has_baseline: whether the reference answers each prompt once too.
        count: the most plans.

    Raises:
        NoFit: there is none.
    """
    fitting = _fitting(roles, work, cluster, limits)
    if not fitting:
        raise NoFit(_refusal(roles, work, cluster, limits))
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
    """Yield every layout that splits all models evenly, divides the GPUs and leaves each copy a prompt."""
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
    """Yield for each layout its choices, the ones that are likely faster first."""
    if limits.micro_batch_tokens is not None:
        budgets = [limits.micro_batch_tokens]
    else:
        budgets = [work.longest]
        while budgets[-1] * 2 <= _MOST_BATCH_TOKENS:
            budgets.append(budgets[-1] * 2)
    recomputes = (False, True) if limits.recompute_layers is None else (limits.recompute_layers,)
    for layout in layouts(roles, work, num_gpus, limits):
        yield [
            Choice(layout=layout, micro_batch_tokens=budget, recompute_layers=again)
            for again in recomputes
            for budget in reversed(budgets)
        ]


_KEPT_BATCHES = 2


def _fitting(
    roles: Roles, work: Workload, cluster: Cluster, limits: Limits
) -> list[tuple[Choice, RankMemory]]:
    """Return for each layout the largest micro-batches that fit; layers run again only where they must."""
    found = []
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
        found += kept
    return found


def _fits(memory: RankMemory, work: Workload, choice: Choice, cluster: Cluster) -> bool:
    return _needed_bytes(memory, work, choice) <= cluster.usable_bytes


def _needed_bytes(memory: RankMemory, work: Workload, choice: Choice) -> int:
    """Return the fullest moment with the smallest cache that generates: a sequence a pipeline stage."""
    cache = choice.layout.pp * _sequence_pages(work) * memory.cache_page
    return max(memory.peak, memory.resident + memory.phases["generate"] + cache)


def _cache(memory: RankMemory, work: Workload, choice: Choice, cluster: Cluster) -> tuple[int, int]:
    """Return how many sequences generate at once on a rank, and the bytes of the cache for them."""
    room = cluster.usable_bytes - memory.resident - memory.phases["generate"]
    a_sequence = _sequence_pages(work) * memory.cache_page
    mine = -(-choice.num_sequences(work, cluster.num_gpus) // choice.layout.cp)
    max_batch = max(choice.layout.pp, min(work.max_batch, mine, room // a_sequence))
    return max_batch, max_batch * a_sequence


def _sequence_pages(work: Workload) -> int:
    """Return the pages that the engine sets aside for a sequence: one more than it fills, for copies."""
    return -(-work.longest // work.page_size) + 1


def _refusal(roles: Roles, work: Workload, cluster: Cluster, limits: Limits) -> str:
    """Return what is missing, and which single changes make a layout fit."""
    least = _least(roles, work, cluster, limits)
    if least is None:
        decided = [f"parallel.{axis} {getattr(limits, axis)}" for axis in _AXES if getattr(limits, axis)]
        if decided and _least(roles, work, cluster, Limits()) is not None:
            return (
                f"no layout with {', '.join(decided)} divides {cluster.num_gpus} GPUs, splits every model "
                f"evenly and leaves each of its copies one of {work.num_prompts} prompts: others do, "
                "leave some of it to the plan"
            )
        return (
            f"no layout divides {cluster.num_gpus} GPUs, splits every model evenly and leaves each of its "
            f"copies one of {work.num_prompts} prompts: give more prompts, or another number of GPUs"
        )
    choice, memory = least
    layout = choice.layout
    roles_gb = ", ".join(f"{name} {_gb(held.total)}" for name, held in memory.roles.items())
    phase = max(memory.phases, key=memory.phases.__getitem__)
    changes = [text for text, is_enough in _changes(roles, work, cluster, limits) if is_enough]
    mend = "; or ".join(changes) if changes else "no single change that was tried is enough: combine them"
    return (
        f"nothing fits {cluster.num_gpus} GPUs with {_gb(cluster.usable_bytes)} to fill: the leanest layout "
        f"({layout_name(layout, cluster.num_gpus)}, "
        f"layers run again: {'yes' if choice.recompute_layers else 'no'}) "
        f"takes {_gb(_needed_bytes(memory, work, choice))} a GPU: {roles_gb}, "
        f"and {_gb(memory.phases[phase])} in the phase {phase}. "
        f"What would do: {mend}"
    )


def _changes(roles: Roles, work: Workload, cluster: Cluster, limits: Limits) -> Iterator[tuple[str, bool]]:
    """Yield single changes, and whether with them a layout fits."""
    if limits != Limits():
        yield "leave the layout to the plan", bool(_fitting(roles, work, cluster, Limits()))
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
            "a reward function in place of the reward model (reward.function)",
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
    """Return the choice whose fullest rank holds least."""
    found = [
        (choices[-1], fullest_rank(roles, work, choices[-1], num_gpus=cluster.num_gpus))
        for choices in _choices(roles, work, cluster.num_gpus, limits)
    ]
    return min(found, key=lambda one: _needed_bytes(one[1], work, one[0]), default=None)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def layout_name(layout: Layout, num_gpus: int) -> str:
    """Return a layout in words, data parallelism included."""
    parts = [f"tp {layout.tp}", f"pp {layout.pp}", f"dp {layout.dp(num_gpus)}"]
    parts += [f"cp {layout.cp}"] if layout.cp > 1 else []
    parts += [f"vpp {layout.vpp}"] if layout.vpp > 1 else []
    return " × ".join(parts)
