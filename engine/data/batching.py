"""Which sequences go through the model together: micro-batches by a budget of tokens."""

from collections.abc import Sequence


def pack_by_tokens(lengths: Sequence[int], *, max_tokens: int) -> list[tuple[int, ...]]:
    """Return groups of indices whose lengths sum to at most `max_tokens`, few and evenly filled.

    First fit, longest first: each sequence joins the first group that has room. One that is longer than
    the budget gets a group of its own.

    Args:
        lengths: tokens of each sequence.
        max_tokens: the budget, at least 1.

    Returns:
        Groups of indices, each ascending, every index in exactly one; the fullest groups come first.

    Raises:
        ValueError: the budget is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, a micro-batch needs at least 1")
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((g for g, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            place = len(groups)
            groups.append([])
            room.append(max_tokens)
        groups[place].append(index)
        room[place] -= lengths[index]
    return [tuple(sorted(groups[g])) for g in sorted(range(len(groups)), key=lambda g: (room[g], g))]
