"""Reward functions: their request and result types, finding one by name, and calling it with checks."""

import importlib
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import TracebackType
from typing import SupportsFloat, cast

_LARGEST = 3.4028234e38  # of fp32
_TEXTS = (str, bytes, bytearray)  # sequences, but of no numbers
_OWN_MODULES = (__name__, "glm_rlhf.engine.rewards.in_process")  # above a function in a traceback
_SHOWN = 200  # characters of a prompt or an answer in a message
_WITHOUT_ORDER = (Mapping, Set, *_TEXTS)
"""What has a length but not one reward per answer, in their order."""


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
    traceback: str | None = None
    """Where the function raised, as Python prints it, from the function on; None where nothing was raised."""


Reward = float | tuple[float, ...]
"""Reward of an answer as a whole, or one number per token of it, its end id included."""

RewardFunction = Callable[[Sequence[RewardRequest]], Sequence[Reward | RewardFailure]]
"""Takes answers and returns one reward for each, in their order."""


class RewardError(ValueError):
    """A reward function that cannot be found, or that returned an invalid reward."""

    def __init__(self, message: str, *, traceback_text: str = "") -> None:
        """Take the sentence, and the traceback of the user's code where that raised."""
        super().__init__(message)
        self.traceback_text = traceback_text


def import_reward_function(name: str) -> RewardFunction:
    """Return the function named `module:function`, of an installed module or one in the current folder.

    Raises:
        RewardError: no such module or function, or the module raised when it was imported; the message says
            which, and where.
    """
    module_name, function_name = split_name(name)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not search it by default
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(f"the module of the reward function {name} cannot be imported: {error}") from error
    except Exception as error:
        frames = error.__traceback__
        while frames is not None and _is_import_machinery(frames.tb_frame.f_code.co_filename):
            frames = frames.tb_next
        lines = traceback.format_exception(type(error), error, frames)
        raise RewardError(
            f"the module of the reward function {name} cannot be imported: {type(error).__name__}: {error}"
            f"{_place(frames)}",
            traceback_text="".join(lines),
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"{module_name} has no function {function_name!r}")
    return function


def split_name(name: str) -> tuple[str, str]:
    """Return the two parts of `module:function`.

    Raises:
        RewardError: another form.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise RewardError(f"a reward function is named module:function, {name!r} is not of that form")
    return module_name, function_name


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
    returned: list[Reward | RewardFailure]
    try:
        answer = function(requests)
        if isinstance(answer, _WITHOUT_ORDER):
            kind = type(answer).__name__
            reason = f"the reward function returned a {kind}, which is no list of one reward per answer"
            returned = [RewardFailure(reason=reason)] * len(requests)
        elif len(returned := list(answer)) != len(requests):
            reason = f"the reward function returned {len(returned)} rewards for {len(requests)} answers"
            returned = [RewardFailure(reason=reason)] * len(requests)
    except (Exception, SystemExit) as error:
        returned = [_failure_of(error)] * len(requests)
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


def _failure_of(error: BaseException) -> RewardFailure:
    """Return the failure of what a function raised, with its place in the function."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__") in _OWN_MODULES:
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames)
    reason = f"the reward function raised {type(error).__name__}: {error}{_place(frames)}"
    return RewardFailure(reason=reason, traceback="".join(lines) if frames is not None else None)


def _place(frames: TracebackType | None) -> str:
    """Return the innermost line of the file in which a traceback begins; empty for an empty one."""
    if frames is None:
        return ""
    file, line = frames.tb_frame.f_code.co_filename, frames.tb_lineno
    while frames is not None:
        if frames.tb_frame.f_code.co_filename == file:
            line = frames.tb_lineno
        frames = frames.tb_next
    return f" ({file}, line {line})"


def _is_import_machinery(file: str) -> bool:
    return file in (__file__, importlib.__file__) or file.startswith("<frozen importlib")


def _checked(value: object, request: RewardRequest) -> Reward | RewardFailure:
    """Return what a reward function returned for an answer, as floats, or a failure if it is not a reward."""
    if isinstance(value, RewardFailure):
        return value
    per_token = _numbers_per_token(value)
    if per_token is None:
        number = _number(value)
        return _not_finite(value) if number is None else number
    num_tokens = len(request.response_tokens)
    if len(per_token) != num_tokens:
        return RewardFailure(reason=f"it has {len(per_token)} numbers for an answer of {num_tokens} tokens")
    found: list[float] = []
    for position, entry in enumerate(per_token):
        number = _number(entry)
        if number is None:
            return _not_finite(entry, f" at token {position}")
        found.append(number)
    return tuple(found)


def _not_finite(value: object, position: str = "") -> RewardFailure:
    return RewardFailure(reason=f"it is {_short(value)}{position}, a finite number is required")


def _numbers_per_token(value: object) -> Sequence[object] | None:
    """Return the entries of a list, or of an array or tensor with dimensions; None for anything else."""
    if isinstance(value, Sequence) and not isinstance(value, _TEXTS):
        return value
    if _num_dims(value):
        entries = value.tolist() if hasattr(value, "tolist") else None
        return entries if isinstance(entries, list) else None
    return None


def _number(value: object) -> float | None:
    """Return a value as a float where it is one number within the range of fp32, of whatever type."""
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if isinstance(value, _TEXTS) or is_complex or _num_dims(value):
        return None
    detach = getattr(value, "detach", None)  # a tensor that is trained warns about its conversion
    try:
        number = float(cast(SupportsFloat, value if detach is None else detach()))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if abs(number) <= _LARGEST else None


def _num_dims(value: object) -> int:
    """Return the dimensions of an array or tensor, of numpy or torch; 0 for anything else."""
    return getattr(value, "ndim", None) or 0


def _short(content: object) -> str:
    try:
        text = repr(content)
    except Exception:
        text = f"of the type {type(content).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"
