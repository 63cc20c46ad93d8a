"""Rewards from a function: what it is given, how it is found, and what it may answer."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRequest:
    """One answer to be judged."""

    prompt_tokens: tuple[int, ...]
    """Ids that the model was given."""
    response_tokens: tuple[int, ...]
    """Ids that it wrote, its end id included."""
    prompt: str | None
    """The prompt's ids as text; None without a tokenizer."""
    response: str | None
    """The answer as text; None without a tokenizer."""
    is_finished: bool
    """Whether the answer ended by itself."""
    extra: Mapping[str, object]
    """Further fields of the prompt's record."""


RewardFunction = Callable[[Sequence[RewardRequest]], Sequence[float]]
"""Takes answers and returns one reward each, in their order."""


class RewardError(ValueError):
    """A reward function that cannot be found, or that answered what is no reward."""


def find_reward(name: str) -> RewardFunction:
    """Return the function called `module:function`, from an installed module or one in the current folder.

    Raises:
        RewardError: no such module or function; the message says which.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise RewardError(f"a reward function is named module:function, {name!r} is not of that form")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there by itself
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(f"the module of the reward function {name} cannot be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"{module_name} has no function {function_name!r}")
    return function


def judge(function: RewardFunction, requests: Sequence[RewardRequest]) -> list[float]:
    """Return a function's rewards, each known to be a finite number; nothing is mended.

    Raises:
        RewardError: the function raised, or its answer has another length, or holds what is no finite
            number: the message names the place and what stood there.
    """
    try:
        rewards = list(function(requests))
    except Exception as error:
        raise RewardError(f"the reward function raised {type(error).__name__}: {error}") from error
    if len(rewards) != len(requests):
        raise RewardError(f"the reward function gave {len(rewards)} rewards for {len(requests)} answers")
    for index, reward in enumerate(rewards):
        is_number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
        if not is_number or not math.isfinite(reward):
            raise RewardError(f"reward {index} of {len(rewards)} is {reward!r}, a finite number is required")
    return [float(reward) for reward in rewards]
