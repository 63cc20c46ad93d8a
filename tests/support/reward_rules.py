"""Reward functions that configs of the tests name."""


def share_of_low_ids(requests) -> list[float]:
    """The share of ids below 48 in each answer."""
    return [sum(t < 48 for t in r.response_tokens) / len(r.response_tokens) for r in requests]


def too_few(requests) -> list[float]:
    return [0.0] * (len(requests) - 1)
