"""Rewards from a function: what it is given, how it is found, and what it may answer."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LARGEST = 3.4028234e38  # of fp32
_SHOWN = 200  # characters of a prompt or an answer in a message


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """Stands where an answer's reward could not be had; a reward function may return it itself."""

    reason: str
    """What happened, in words that follow the answer's name: `is nan, …`."""


Reward = float | tuple[float, ...]
"""Of an answer as a whole, or one a token of it, its end id included."""

RewardFunction = Callable[[Sequence[RewardRequest]], Sequence[Reward | RewardFailure]]
"""Takes answers and returns one reward each, in their order."""


class RewardError(ValueError):
    """A reward function that cannot be found, or that answered what is no reward."""


def find_rule(name: str) -> RewardFunction:
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


def call_reward_function(
    function: RewardFunction, requests: Sequence[RewardRequest], *, skip_failures: bool = False
) -> list[Reward | RewardFailure]:
    """Return a function's rewards, each known to be finite; nothing is mended, no fault becomes a number.

    Args:
        function: judges the answers.
        requests: the answers.
        skip_failures: whether a fault stands in place of its answer's reward, rather than being raised. A
            function that raises, or answers with another count, is a fault of every answer.

    Raises:
        RewardError: a fault; the message names its place, prompt and answer, and what stood there.
    """
    try:
        answers = list(function(requests))
        if len(answers) != len(requests):
            reason = f"the reward function gave {len(answers)} rewards for {len(requests)} answers"
            answers = [RewardFailure(reason=reason)] * len(requests)
    except Exception as error:
        reason = f"the reward function raised {type(error).__name__}: {error}"
        answers = [RewardFailure(reason=reason)] * len(requests)
    found = [_checked(answer, request) for answer, request in zip(answers, requests, strict=True)]
    if not skip_failures:
        raise_on_failures(found, requests)
    return found


def raise_on_failures(found: Sequence[Reward | RewardFailure], requests: Sequence[RewardRequest]) -> None:
    """Raise RewardError where an answer has a fault in place of a reward; the message names the first."""
    for index, reward in enumerate(found):
        if isinstance(reward, RewardFailure):
            raise RewardError(f"reward {index} of {len(found)}, {describe(requests[index], reward)}")


def describe(request: RewardRequest, fault: RewardFailure) -> str:
    """Return a fault in words, with the beginning of its prompt and answer."""
    prompt = request.prompt_tokens if request.prompt is None else request.prompt
    response = request.response_tokens if request.response is None else request.response
    return f"of the answer {_short(response)} to the prompt {_short(prompt)}: {fault.reason}"


def _checked(answer: object, request: RewardRequest) -> Reward | RewardFailure:
    if isinstance(answer, RewardFailure):
        return answer
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        if _is_number(answer):
            return float(answer)
        return RewardFailure(reason=f"it is {_short(answer)}, a finite number is required")
    num_tokens = len(request.response_tokens)
    if len(answer) != num_tokens:
        return RewardFailure(reason=f"it has {len(answer)} numbers for an answer of {num_tokens} tokens")
    for place, number in enumerate(answer):
        if not _is_number(number):
            return RewardFailure(
                reason=f"it is {_short(number)} at token {place}, a finite number is required"
            )
    return tuple(float(number) for number in answer)


def _is_number(value: object) -> bool:
    """Return whether a value is a number that fp32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _short(content: object) -> str:
    text = repr(content)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"
