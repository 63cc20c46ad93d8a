"""Assigns sequences to ranks and to micro-batches of a limited number of tokens."""

import heapq
from collections.abc import Sequence


def pack_by_tokens(lengths: Sequence[int], *, max_tokens: int) -> list[tuple[int, ...]]:
    """Return few, evenly filled groups of indices whose lengths sum to at most `max_tokens`.

    First fit, longest first: each sequence joins the first group that has room. A sequence longer than
    `max_tokens` gets a group of its own.

    Args:
        lengths: tokens of each sequence.
        max_tokens: most tokens per group, at least 1.

    Returns:
        Groups of ascending indices, every index in exactly one group; the fullest groups come first.

    Raises:
        ValueError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, a micro-batch needs at least 1")
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = next((g for g, free in enumerate(room) if free >= lengths[index]), None)
        if target is None:
            target = len(groups)
            groups.append([])
            room.append(max_tokens)
        groups[target].append(index)
        room[target] -= lengths[index]
    return [tuple(sorted(groups[g])) for g in sorted(range(len(groups)), key=lambda g: (room[g], g))]


def deal_by_tokens(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return each rank's share of the sequences, with numbers of tokens balanced greedily.

    Longest first, each sequence goes to the rank with the fewest tokens so far: the fullest rank has at most
    4/3 - 1/(3 · num_ranks) times the tokens of the optimal assignment. The same lengths give the same result
    on all ranks, without communication.

    Args:
        lengths: tokens of each sequence; an entry may stand for a pair, whose answers stay together.
        num_ranks: data-parallel ranks, at least 1.

    Returns:
        `num_ranks` ascending lists of indices, every index in exactly one. A list is empty only if there are
        fewer sequences than ranks.

    Raises:
        ValueError: num_ranks is below 1.

    Source: R. L. Graham, Bounds on multiprocessing timing anomalies (1969), the longest-processing-time rule;
    ties go to the rank with fewer sequences, then to the lower rank.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; it must be at least 1")
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    fewest = [(0, 0, rank) for rank in range(num_ranks)]  # tokens, sequences, rank: a heap
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, count, rank = fewest[0]
        shares[rank].append(index)
        heapq.heapreplace(fewest, (tokens + lengths[index], count + 1, rank))
    return [sorted(share) for share in shares]


def deal_micro_batches(
    lengths: Sequence[int], *, num_ranks: int, max_tokens: int
) -> list[list[tuple[int, ...]]]:
    """Return each rank's micro-batches, the same number on all ranks.

    `deal_by_tokens` gives each rank its sequences and `pack_by_tokens` groups them. Ranks with fewer groups
    than the others then split their fullest ones, which costs only launches. A rank without enough sequences
    to split gets empty micro-batches, `()`: it runs them on padding that no mask selects, so that it takes
    part in every collective.

    Args:
        lengths: tokens of each sequence.
        num_ranks: data-parallel ranks, at least 1.
        max_tokens: most tokens per micro-batch, at least 1; a longer sequence gets one of its own.

    Returns:
        `num_ranks` lists of the same length, every index in exactly one micro-batch, empty ones last.

    Raises:
        ValueError: max_tokens or num_ranks is below 1.
    """
    dealt = []
    for share in deal_by_tokens(lengths, num_ranks):
        groups = pack_by_tokens([lengths[i] for i in share], max_tokens=max_tokens)
        dealt.append([tuple(share[i] for i in group) for group in groups])
    most = max(len(groups) for groups in dealt)
    return [_split_to(groups, most, lengths) for groups in dealt]


def _split_to(groups: list[tuple[int, ...]], count: int, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return `count` groups, made by splitting the fullest first; empty groups where none can be split."""
    # A heap, fullest first; groups of one sequence cannot be split and go to the result.
    waiting = [(-sum(lengths[i] for i in group), group) for group in groups if len(group) > 1]
    heapq.heapify(waiting)
    done = [group for group in groups if len(group) == 1]
    while waiting and len(waiting) + len(done) < count:
        _, group = heapq.heappop(waiting)
        for half in deal_by_tokens([lengths[i] for i in group], 2):
            part = tuple(group[i] for i in half)
            if len(part) > 1:
                heapq.heappush(waiting, (-sum(lengths[i] for i in part), part))
            else:
                done.append(part)
    whole = [*done, *(group for _, group in waiting)]
    whole.sort(key=lambda group: (-sum(lengths[i] for i in group), group))
    return whole + [()] * (count - len(whole))
