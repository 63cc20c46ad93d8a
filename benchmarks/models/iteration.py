"""Row n: how much of an iteration of PPO is neither generation nor matrix products nor attention."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.models.sizes import ModelSizes, fill_on_device, micro_batch_tokens
from glm_rlhf.engine.bench.full_length import full_length_work, random_prompts
from glm_rlhf.engine.bench.harness import Entry, summary
from glm_rlhf.engine.bench.parts.ppo import iteration_s, make_roles, phases_entry
from glm_rlhf.engine.cost.workload import Choice
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.layout import Layout

_PRODUCTS = re.compile(
    r"gemm|nvjet|cutlass|xmma|cublas|splitk|flash|fmha|attention|_linear_logprob"  # kernels of CUDA
    r"|^aten::(mm|addmm|addmv|bmm|baddbmm)_?$|scaled_dot_product",  # operations of a CPU
    re.IGNORECASE,
)
_WARM_UP, _RUNS = 1, 3
_LARGEST = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTimes:
    """Where a device spent its time in some work."""

    products_s: float
    """Matrix products and attention."""
    others_s: float
    """Everything else that ran."""
    largest: dict[str, float]
    """Seconds of the largest of the others, by name."""


def iteration_entry(topology: Topology, sizes: ModelSizes, num_layers: int) -> tuple[Entry, str]:
    """Return an iteration with its phases and shares, and what the largest of the others are.

    `outside %` is the share of an iteration's wall-clock time in which it neither generates nor, in one more
    iteration that is profiled, computes a matrix product or attention while it scores and learns: other
    kernels, and gaps in which the device waits for the host.
    """
    work = full_length_work(
        prompt_tokens=sizes.prompt_tokens,
        new_tokens=sizes.answer_tokens,
        num_prompts=sizes.num_prompts,
        max_step_tokens=sizes.step_tokens,
        itemsize=sizes.dtype.itemsize,
        page_size=sizes.page_size,
    )
    choice = Choice(layout=Layout(), micro_batch_tokens=micro_batch_tokens(sizes), recompute_layers=False)
    model = replace(sizes.model, num_layers=num_layers)
    roles = make_roles(topology, model=model, work=work, choice=choice, fill=fill_on_device)
    prompts = random_prompts(model, work)
    runs = [iteration_s(roles, prompts, topology) for _ in range(_WARM_UP + _RUNS)][_WARM_UP:]
    rollouts = roles.generate(prompts)
    metrics: dict[str, float] = {}

    def learn() -> None:
        metrics.update(roles.update(roles.make_experience(rollouts)))

    times = kernel_times(learn, topology.device)
    entry = _entry(runs, times, metrics)
    return entry, ", ".join(f"{name[:60]} {1e3 * seconds:.3g} ms" for name, seconds in times.largest.items())


def kernel_times(work: Callable[[], None], device: torch.device) -> KernelTimes:
    """Return where the device spends its time in `work`: kernels on CUDA, operations' own time on a CPU."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        work()
        if is_cuda:
            torch.cuda.synchronize(device)
    averages = profiler.key_averages()
    seconds = {
        event.key: event.self_cpu_time_total / 1e6
        for event in averages
        if event.device_type == DeviceType.CPU
    }
    if is_cuda:
        # A range that the host names comes back as one of the device; it is no kernel.
        seconds = {
            event.key: event.self_device_time_total / 1e6
            for event in averages
            if event.device_type == DeviceType.CUDA and event.key not in seconds
        }
    return classified(seconds)


def classified(seconds: Mapping[str, float]) -> KernelTimes:
    """Return times by kernel as products and others."""
    others = {name: one for name, one in seconds.items() if not _PRODUCTS.search(name)}
    largest = sorted(others, key=others.get, reverse=True)[:_LARGEST]
    return KernelTimes(
        products_s=sum(seconds.values()) - sum(others.values()),
        others_s=sum(others.values()),
        largest={name: others[name] for name in largest},
    )


def _entry(runs: Sequence[dict[str, float]], times: KernelTimes, metrics: Mapping[str, float]) -> Entry:
    entry = phases_entry(runs)
    generate_s = summary([run["generate"] for run in runs]).median_s
    outside_s = entry.timing.median_s - generate_s - times.products_s
    figures = entry.figures | {
        "products ms": 1e3 * times.products_s,
        "other kernels ms": 1e3 * times.others_s,
        "outside %": 100 * outside_s / entry.timing.median_s,
    }
    if "rollout/logprob_gap" in metrics:
        figures["logprob gap"] = metrics["rollout/logprob_gap"]
    return replace(entry, figures=figures)
