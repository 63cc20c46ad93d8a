"""Rows of the kernels: ours against eager torch and the peers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from glm_rlhf.engine.bench.harness import Contender, Entry, Problem, measure
from glm_rlhf.engine.bench.kernel_rows.case import Case
from glm_rlhf.engine.bench.machine import MachineRates
from glm_rlhf.engine.bench.report import Row


def measured_case(
    case: Case,
    device: torch.device,
    rates: MachineRates,
    *,
    budget_s: float,
    command: str,
    keeps: Callable[[Contender], bool],
) -> Row:
    """Return the row of a case; one whose inputs cannot be made says so.

    Args:
        case: task and shape.
        device: where it runs.
        rates: bound the time of a run.
        budget_s: seconds of timed runs.
        command: measures the row again.
        keeps: which contenders run.
    """
    torch.compiler.reset()
    try:
        problem = with_contenders(case.build(device), keeps)
    except (RuntimeError, ValueError) as error:  # such as: out of memory
        text = str(error).strip().splitlines()[0][:160]
        return row_of(case, rates, [Entry(name="ours", status=f"failed: {text}")], command)
    entries = measure(problem, device=device, budget_s=budget_s, counts_memory=case.counts_memory)
    del problem
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row_of(case, rates, entries, command)


def row_of(case: Case, rates: MachineRates, entries: Sequence[Entry], command: str) -> Row:
    """Return the row of a case with the entries of its contenders and its limit."""
    return Row(
        row=case.row,
        what=case.what,
        shape=f"{case.model}: {case.shape}",
        command=command,
        entries=entries,
        limit_s=rates.limit_s(case.num_bytes, case.num_flop),
        target_s=case.target_s,
    )


def with_contenders(problem: Problem, keeps: Callable[[Contender], bool]) -> Problem:
    """Return the problem with those of its contenders that `keeps` accepts."""
    return replace(problem, contenders=[one for one in problem.contenders if keeps(one)])


def is_not_compiled(contender: Contender) -> bool:
    """Return whether a contender does not use torch.compile."""
    return not contender.name.startswith("torch.compile")
