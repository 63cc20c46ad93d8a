"""Numbers that are none end a step on every rank alike, with the ranks and the place that have them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

_MAX_NAMED = 3


def raise_if_nonfinite(findings: Sequence[str], consequence: str, *, device: torch.device) -> None:
    """Do nothing where no rank has findings; every rank of the world calls this: 8 bytes are all-reduced.

    Args:
        findings: what this rank has found, and in what, such as "the policy's loss in answers 3, 5".
        consequence: what does not happen now, for the message.
        device: that the world's collectives take.

    Raises:
        FloatingPointError: some rank has findings; the message, the same on all, names ranks and findings.
    """
    if found := find_nonfinite(findings, device=device):
        raise FloatingPointError(f"not finite: {found}; {consequence}")


def find_nonfinite(findings: Sequence[str], *, device: torch.device) -> str:
    """Return the findings of all ranks in words, empty where no rank has any; every rank of the world calls
    this.

    8 bytes are all-reduced; more is communicated only where some rank has findings.
    """
    count = torch.tensor([len(findings)], device=device)
    dist.all_reduce(count)
    return gather_findings(findings) if int(count) else ""


def gather_findings(findings: Sequence[str]) -> str:
    """Return the findings of all ranks as words; every rank of the world calls this."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, list(findings[:_MAX_NAMED]))
    by_words: dict[str, list[int]] = {}
    for rank, found in enumerate(everyone):
        if found:
            by_words.setdefault(", ".join(found), []).append(rank)
    return "; ".join(f"on rank {', '.join(map(str, ranks))} {words}" for words, ranks in by_words.items())


def abbreviate(numbers: Sequence[object]) -> str:
    """Return the first of some numbers, or names, as words."""
    more = f" and {len(numbers) - _MAX_NAMED} more" if len(numbers) > _MAX_NAMED else ""
    return ", ".join(map(str, numbers[:_MAX_NAMED])) + more
