"""Reward functions: their request and result types, finding one by name, and calling it with checks."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LARGEST = 3.4028234e38  # of fp32
_SHOWN = 200  # characters of a prompt or an answer in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRequest:
    """One answer to score."""

    prompt_tokens: tuple[int, ...]
    """Token ids of the prompt."""
    response_tokens: tuple[int, ...]
    """Token ids of the answer, its end id included."""
    prompt: str | None
    """The prompt as text; None without a tokenizer."""
    response: str | None
    """The answer as text; None without a tokenizer."""
    is_finished: bool
    """Whether the answer ended with a stop token or text; false where it was cut at its maximum length."""
    extra: Mapping[str, object]
    """Other fields of the prompt's record, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """Takes the place of a missing reward; a reward function may return it too."""

    reason: str
    """Why there is no reward: one clause."""


Reward = float | tuple[float, ...]
"""Reward of an answer as a whole, or one number per token of it, its end id included."""

RewardFunction = Callable[[Sequence[RewardRequest]], Sequence[Reward | RewardFailure]]
"""Takes answers and returns one reward for each, in their order."""


class RewardError(ValueError):
    """A reward function that cannot be found, or that returned an invalid reward."""


def import_reward_function(name: str) -> RewardFunction:
    """Return the function named `module:function`, of an installed module or one in the current folder.

    Raises:
        RewardError: no such module or function; the message says which.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise RewardError(f"a reward function is named module:function, {name!r} is not of that form")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not search it by default
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(f"the module of the reward function {name} cannot be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"{module_name} has no function {function_name!r}")
    return function


def call_reward_function(
    function: RewardFunction, requests: Sequence[RewardRequest], *, skip_failures: bool = False
) -> list[Reward | RewardFailure]:
    """Return a function's rewards, each of them finite; a failure is never replaced by a number.

    Args:
        function: the reward function.
        requests: the answers.
        skip_failures: whether a failure takes the place of its reward instead of being raised. Where the
            function raises, or returns another number of rewards, each answer has a failure.

    Raises:
        RewardError: a failure, without `skip_failures`; the message names the answer and what was returned.
    """
    try:
        returned = list(function(requests))
        if len(returned) != len(requests):
            reason = f"the reward function returned {len(returned)} rewards for {len(requests)} answers"
            returned = [RewardFailure(reason=reason)] * len(requests)
    except Exception as error:
        reason = f"the reward function raised {type(error).__name__}: {error}"
        returned = [RewardFailure(reason=reason)] * len(requests)
    rewards = [_checked(value, request) for value, request in zip(returned, requests, strict=True)]
    if not skip_failures:
        raise_on_failures(rewards, requests)
    return rewards


def raise_on_failures(rewards: Sequence[Reward | RewardFailure], requests: Sequence[RewardRequest]) -> None:
    """Raise RewardError if an answer has a failure instead of a reward; the message names the first one."""
    for index, reward in enumerate(rewards):
        if isinstance(reward, RewardFailure):
            raise RewardError(f"reward {index} of {len(rewards)}, {describe(requests[index], reward)}")


def describe(request: RewardRequest, failure: RewardFailure) -> str:
    """Return a failure with the beginnings of its answer and prompt."""
    prompt = request.prompt_tokens if request.prompt is None else request.prompt
    response = request.response_tokens if request.response is None else request.response
    return f"of the answer {_short(response)} to the prompt {_short(prompt)}: {failure.reason}"


def _checked(value: object, request: RewardRequest) -> Reward | RewardFailure:
    """Return what a reward function returned for an answer, as floats, or a failure if it is not a reward."""
    if isinstance(value, RewardFailure):
        return value
    if not isinstance(value, Sequence) or isinstance(value, str):
        if _is_number(value):
            return float(value)
        return RewardFailure(reason=f"it is {_short(value)}, a finite number is required")
    num_tokens = len(request.response_tokens)
    if len(value) != num_tokens:
        return RewardFailure(reason=f"it has {len(value)} numbers for an answer of {num_tokens} tokens")
    for position, number in enumerate(value):
        if not _is_number(number):
            return RewardFailure(
                reason=f"it is {_short(number)} at token {position}, a finite number is required"
            )
    return tuple(float(number) for number in value)


def _is_number(value: object) -> bool:
    """Return whether a value is a number within the range of fp32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _short(content: object) -> str:
    text = repr(content)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"
