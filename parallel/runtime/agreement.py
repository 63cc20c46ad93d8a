"""Whether all ranks were started alike, so that none trains other numbers than the rest."""

import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

_SHOWN = 120  # characters of a value in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Something on a host's disks that ranks compare by what it holds."""

    place: str
    """Where it lies: ranks of one host with equal places share one digest."""
    digest: Callable[[], str]
    """Reads it; where it cannot be read, its answer says so in place of a digest."""


def check_ranks_agree(values: Mapping[str, str], contents: Mapping[str, Content]) -> None:
    """Raise where ranks differ, the same on all of them; every rank of the world calls this.

    Two small all-gathers; of the ranks on one host that name the same place, the lowest reads it.

    Args:
        values: what has to be equal on every rank, by a name for messages.
        contents: what has to hold the same on every rank, by a name for messages.

    Raises:
        ValueError: names the first thing that differs, its values and the ranks.
    """
    host, places = socket.gethostname(), {name: content.place for name, content in contents.items()}
    reported: list[tuple[str, dict[str, str], dict[str, str]]] = [("", {}, {})] * dist.get_world_size()
    dist.all_gather_object(reported, (host, dict(values), places))
    _compare([values for _, values, _ in reported], "is {mine} on {where} and {other} on {others}")
    owners: dict[tuple[str, str, str], int] = {}
    for rank, (where, _, named) in enumerate(reported):
        for name, place in named.items():
            owners.setdefault((where, name, place), rank)
    rank = dist.get_rank()
    digests = {
        (host, name, content.place): content.digest()
        for name, content in contents.items()
        if owners[host, name, content.place] == rank
    }
    everyone: list[dict[tuple[str, str, str], str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    found = {key: digest for part in everyone for key, digest in part.items()}
    _compare(
        [
            {name: f"{found[where, name, place]}\n{place}" for name, place in named.items()}
            for where, _, named in reported
        ],
        "holds something else on {where} ({mine}) than on {others} ({other})",
    )


def _compare(reported: list[dict[str, str]], sentence: str) -> None:
    """Raise ValueError at the first name whose value is not the same everywhere.

    Of a value with a line break only the first line counts, and only the second is shown.
    """
    names = list(dict.fromkeys(name for values in reported for name in values))
    for name in names:
        values = [values.get(name, "absent") for values in reported]
        counts = Counter(value.partition("\n")[0] for value in values)
        if len(counts) == 1:
            continue
        rare = min(reversed(counts), key=counts.__getitem__)  # of two as rare, the one of the later rank
        ranks = [rank for rank, value in enumerate(values) if value.partition("\n")[0] == rare]
        others = [rank for rank in range(len(values)) if rank not in ranks]
        difference = sentence.format(
            mine=_shown(values[ranks[0]]),
            where=_named(ranks),
            other=_shown(values[others[0]]),
            others=_named(others),
        )
        raise ValueError(f"{name} {difference}: every rank of a launch has to be started alike")


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")


def _shown(value: str) -> str:
    text = value.partition("\n")[2] or value
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
