"""Checks requests and limits, so that generation can finish."""

from collections.abc import Sequence

from glm_rlhf.engine.rollout.scheduling.requests import GenerationRequest

__all__ = ["check_limits", "check_requests"]


def check_limits(
    num_pages: int, page_size: int, max_batch: int, max_step_tokens: int, num_groups: int
) -> None:
    """Raise ValueError if no sequence could run, or a group's decodes would not fit in a step."""
    limits = {"num_pages": num_pages, "page_size": page_size, "num_groups": num_groups}
    for name, number in limits.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    if max_batch < num_groups:
        raise ValueError(
            f"max_batch is {max_batch}, but there are {num_groups} groups and each needs a sequence; "
            f"raise max_batch to at least {num_groups}"
        )
    largest_group = -(-max_batch // num_groups)
    if max_step_tokens < largest_group:
        raise ValueError(
            f"max_step_tokens is {max_step_tokens}, but {largest_group} sequences of a group decode in one "
            f"step (max_batch {max_batch} over {num_groups} groups); raise max_step_tokens or lower max_batch"
        )


def check_requests(requests: Sequence[GenerationRequest], num_positions: int) -> None:
    """Raise ValueError, naming the record, unless each request fits alone in `num_positions`."""
    seen = set()
    for request in requests:
        record = f"record {request.index}"
        length = len(request.prompt)
        if request.index in seen:
            raise ValueError(f"{record} occurs twice; give each request an index of its own")
        seen.add(request.index)
        if length == 0:
            raise ValueError(f"{record} has an empty prompt; give at least one token")
        if request.num_samples < 1:
            raise ValueError(f"{record} asks for {request.num_samples} samples; ask for at least 1")
        if request.max_new_tokens < 1:
            raise ValueError(f"{record} has max_new_tokens {request.max_new_tokens}; allow at least 1")
        if length > num_positions:
            raise ValueError(
                f"{record} has a prompt of {length} tokens, longer than the whole cache of {num_positions} "
                "positions; shorten the prompt or give the cache more pages"
            )
        if length + request.max_new_tokens > num_positions:
            raise ValueError(
                f"{record} needs up to {length} + {request.max_new_tokens} positions (prompt + "
                f"max_new_tokens), the whole cache has {num_positions}; lower max_new_tokens or give the "
                "cache more pages"
            )
