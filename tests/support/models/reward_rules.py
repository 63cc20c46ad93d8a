"""Reward functions that configs of the tests name."""


def share_of_low_ids(requests) -> list[float]:
    """The share of ids below 48 in each answer."""
    return [sum(t < 48 for t in r.response_tokens) / len(r.response_tokens) for r in requests]


def too_few(requests) -> list[float]:
    return [0.0] * (len(requests) - 1)


def low_id_tokens(requests) -> list[list[float]]:
    """1 for each token below 48, 0 for the others."""
    return [[float(t < 48) for t in r.response_tokens] for r in requests]


def nan_after_long_prompts(requests) -> list[float]:
    """0.5, but NaN for prompts of more than 6 tokens."""
    return [0.5 if len(r.prompt_tokens) <= 6 else float("nan") for r in requests]
