"""NaN and Inf raise on all ranks, with a message that names the ranks and the tensors that have them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

_MAX_NAMED = 3


def raise_if_nonfinite(findings: Sequence[str], consequence: str, *, device: torch.device) -> None:
    """Return if no rank has findings; every rank of the world calls this: 8 bytes are all-reduced.

    Args:
        findings: the non-finite values of this rank, such as "the policy's loss in answers 3, 5".
        consequence: what is not done because of them, for the message.
        device: of the world's collectives.

    Raises:
        FloatingPointError: some rank has findings; the message, equal on all ranks, names ranks and findings.
    """
    if described := find_nonfinite(findings, device=device):
        raise FloatingPointError(f"not finite: {described}; {consequence}")


def find_nonfinite(findings: Sequence[str], *, device: torch.device) -> str:
    """Return one line with the findings of all ranks, empty if there are none; every rank calls this.

    8 bytes are all-reduced; more is communicated only if some rank has findings.
    """
    count = torch.tensor([len(findings)], device=device)
    dist.all_reduce(count)
    return gather_findings(findings) if int(count) else ""


def gather_findings(findings: Sequence[str]) -> str:
    """Return one line with the findings of all ranks; every rank of the world calls this."""
    per_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(per_rank, list(findings[:_MAX_NAMED]))
    ranks_of: dict[str, list[int]] = {}
    for rank, its_findings in enumerate(per_rank):
        if its_findings:
            ranks_of.setdefault(", ".join(its_findings), []).append(rank)
    return "; ".join(f"on rank {', '.join(map(str, ranks))} {text}" for text, ranks in ranks_of.items())


def abbreviate(items: Sequence[object]) -> str:
    """Return the first items, and how many more there are."""
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return ", ".join(map(str, items[:_MAX_NAMED])) + more
