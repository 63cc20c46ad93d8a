"""The report of plans as text for a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from glm_rlhf.engine.config.plan import PlanConfig
from glm_rlhf.engine.cost.hardware import Cluster
from glm_rlhf.engine.cost.iteration_time import Estimate, PhaseTime, estimate
from glm_rlhf.engine.cost.memory import rank_memory
from glm_rlhf.engine.cost.workload import Roles, Workload
from glm_rlhf.engine.plan.output_files import REWARD_PLACEHOLDER
from glm_rlhf.engine.plan.search import LayoutPlan, layout_name
from glm_rlhf.parallel.spec.shard_sizes import num_parameters
from glm_rlhf.parallel.spec.weight_map import SCALAR_ROLES

_TRAINING = ("train policy", "train critic")
Row = tuple[str, ...]


def report(
    config: PlanConfig, roles: Roles, work: Workload, cluster: Cluster, plans: Sequence[LayoutPlan]
) -> str:
    """Return the report on all plans, with details of the first one."""
    best = plans[0]
    lines = [*_heading(config, roles, work, cluster), "", "plans, fastest first"]
    lines += _table(_plan_rows(plans, cluster))
    for number, plan in enumerate(plans, start=1):
        lines.append(f"  {number}: {_reason(plan, best, cluster)}")
    lines += [
        "",
        "memory of plan 1 in GB, by pipeline stage",
        *_table(_memory_rows(roles, work, cluster, best)),
    ]
    lines += ["", "time of plan 1, one iteration", *_table(_time_rows(best.estimate))]
    lines += ["", "plan 1 on more GPUs", *_table(_scaling_rows(config, roles, work, cluster, best))]
    lines += ["", *_notes(config)]
    return "\n".join(lines) + "\n"


def _heading(config: PlanConfig, roles: Roles, work: Workload, cluster: Cluster) -> Iterator[str]:
    sizes = ", ".join(
        f"{name} {num_parameters(model, has_scalar_head=name in SCALAR_ROLES) / 1e9:.2f} B"
        for name, model in roles.items
    )
    yield f"{config.model.path}: {sizes} parameters, {config.train.dtype}"
    yield (
        f"{cluster.num_gpus} × {config.cluster.gpu}, {_gb(cluster.gpu.memory_bytes)} GB each, of which "
        f"{_gb(cluster.usable_bytes)} usable; {min(cluster.gpus_per_node, cluster.num_gpus)} per node"
    )
    yield (
        f"{work.num_prompts} prompts × {work.num_samples} per iteration; up to {work.max_prompt_tokens} + "
        f"{work.max_new_tokens} tokens, {work.mean_prompt_tokens} + {work.mean_new_tokens} on average"
    )
    yield f"rates: {cluster.rates.source}"


def _plan_rows(plans: Sequence[LayoutPlan], cluster: Cluster) -> Iterator[Row]:
    yield ("", "layout", "micro-batch", "recompute", "peak GB", "s", "tokens/s/GPU", "MFU", "idle")
    for number, plan in enumerate(plans, start=1):
        total = plan.estimate.total
        yield (
            str(number),
            layout_name(plan.choice.layout, cluster.num_gpus),
            str(plan.choice.micro_batch_tokens),
            "yes" if plan.choice.recompute_layers else "no",
            _gb(plan.peak_bytes),
            f"{total.seconds:.1f}",
            f"{plan.estimate.tokens_per_s_per_gpu:.0f}",
            f"{plan.estimate.mfu(_TRAINING):.0%}",
            f"{total.idle_s / total.seconds:.0%}",
        )


def _reason(plan: LayoutPlan, best: LayoutPlan, cluster: Cluster) -> str:
    phases, total = plan.estimate.phases, plan.estimate.total
    if plan is best:
        longest = max(phases, key=lambda name: phases[name].seconds)
        return (
            f"the fastest that fits; {phases[longest].seconds / total.seconds:.0%} of its time is {longest}, "
            f"{total.communication_s / total.seconds:.0%} communication, "
            f"{_gb(cluster.usable_bytes - plan.peak_bytes)} GB remain free"
        )
    others = best.estimate.phases
    slower = max(phases, key=lambda name: phases[name].seconds - others[name].seconds)
    phase, of_best = phases[slower], others[slower]
    causes = {
        "communication": phase.communication_s - of_best.communication_s,
        "waiting for other stages": phase.idle_s - of_best.idle_s,
    }
    causes["computing"] = phase.seconds - of_best.seconds - sum(causes.values())
    cause = max(causes, key=causes.__getitem__)
    factor = total.seconds / best.estimate.total.seconds
    return f"{factor:.2f} × the time of plan 1, most of it in {slower}: {causes[cause]:+.1f} s of {cause}"


def _memory_rows(roles: Roles, work: Workload, cluster: Cluster, plan: LayoutPlan) -> Iterator[Row]:
    pp = plan.choice.layout.pp
    stages = sorted({0, min(1, pp - 1), pp - 1})
    ranks = [
        rank_memory(roles, work, plan.choice, num_gpus=cluster.num_gpus, stage=stage) for stage in stages
    ]
    yield ("", *(f"stage {stage}" for stage in stages))
    for name in ranks[0].roles:
        for part in ("weights", "gradients", "optimizer"):
            amounts = [getattr(rank.roles[name], part) for rank in ranks]
            if any(amounts):
                yield (f"{name}: {part}", *map(_gb, amounts))
    yield ("held all the time", *(_gb(rank.resident) for rank in ranks))
    for phase in ranks[0].phases:
        if phase == "generate":
            yield ("+ generate: key/value cache", *(_gb(plan.cache_bytes) for _ in ranks))
            yield ("+ generate: a full step", *(_gb(rank.phases[phase]) for rank in ranks))
        elif phase != "start":
            yield (f"+ {phase}", *(_gb(rank.phases[phase]) for rank in ranks))
    yield ("while optimizers are created", *(_gb(rank.resident + rank.phases["start"]) for rank in ranks))
    peaks = [
        rank.resident
        + max(size + plan.cache_bytes * (name == "generate") for name, size in rank.phases.items())
        for rank in ranks
    ]
    yield ("peak", *map(_gb, peaks))


def _time_rows(times: Estimate) -> Iterator[Row]:
    yield ("", "s", "share", "communication s", "idle", "MFU")
    for name, phase in times.phases.items():
        yield _time_row(name, phase, times, (name,))
    yield _time_row("iteration", times.total, times, tuple(times.phases))


def _time_row(name: str, phase: PhaseTime, times: Estimate, names: tuple[str, ...]) -> Row:
    return (
        name,
        f"{phase.seconds:.2f}",
        f"{phase.seconds / times.total.seconds:.0%}",
        f"{phase.communication_s:.2f}",
        f"{phase.idle_s / phase.seconds:.0%}" if phase.seconds else "",
        f"{times.mfu(names):.0%}",
    )


def _scaling_rows(
    config: PlanConfig, roles: Roles, work: Workload, cluster: Cluster, plan: LayoutPlan
) -> Iterator[Row]:
    yield ("GPUs", "prompts", "s", "tokens/s/GPU", "idle", "same prompts: s", "idle")
    factor = 1
    while cluster.num_gpus * factor <= max(config.plan.scaling_to, cluster.num_gpus):
        more = replace(cluster, num_gpus=cluster.num_gpus * factor)
        grown = _estimated(config, roles, replace(work, num_prompts=work.num_prompts * factor), more, plan)
        cells = [str(more.num_gpus), str(work.num_prompts * factor), f"{grown.total.seconds:.1f}"]
        cells += [f"{grown.tokens_per_s_per_gpu:.0f}", f"{grown.total.idle_s / grown.total.seconds:.0%}"]
        if plan.choice.layout.dp(more.num_gpus) <= work.num_prompts:
            same = _estimated(config, roles, work, more, plan)
            cells += [f"{same.total.seconds:.1f}", f"{same.total.idle_s / same.total.seconds:.0%}"]
        else:
            cells += ["too few", ""]
        yield tuple(cells)
        factor *= 2


def _estimated(
    config: PlanConfig, roles: Roles, work: Workload, cluster: Cluster, plan: LayoutPlan
) -> Estimate:
    return estimate(
        roles,
        work,
        plan.choice,
        cluster,
        num_concurrent=plan.max_batch,
        has_baseline=config.ppo.reference_baseline,
    )


def _notes(config: PlanConfig) -> Iterator[str]:
    yield (
        "Memory is estimated for maximum lengths, time for mean lengths. All sequences are taken to have one "
        "length: the tail of generation that answers of different lengths cause is not included, nor is the "
        "SFT loss on demonstrations (data.sft_path)."
    )
    unset = [f"model.path ({config.model.path})", f"data.path ({config.data.path})"]
    if config.reward.path is None and config.reward.function is None:
        unset.append(f"reward.path ({REWARD_PLACEHOLDER})")
    yield f"Before launching, set these paths in the config: {', '.join(unset)}."


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}"


def _table(rows: Iterator[Row]) -> list[str]:
    """Return aligned rows: names left-aligned, numbers right-aligned."""
    cells = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    is_named = cells[0][:2] == ("", "layout")
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if column < 1 + is_named else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return lines
