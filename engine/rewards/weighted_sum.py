"""A reward function as a weighted sum of reward functions, parsed from text."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from glm_rlhf.engine.rewards.function import (
    Reward,
    RewardError,
    RewardFailure,
    RewardFunction,
    RewardRequest,
    call_reward_function,
)
from glm_rlhf.engine.rewards.in_process import InProcessReward

_PLUS = re.compile(r"\s+\+\s+")
_TERM = re.compile(r"(?:(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*\*\s*)?(?P<name>\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One summand of a reward."""

    name: str
    """As written in the config."""
    weight: float
    """Its factor."""
    function: RewardFunction
    """Its reward function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSum:
    """A reward function that sums others.

    Where some terms return per-token rewards and others one number, the number is added to the last token. A
    failure of one term is a failure of the sum.
    """

    terms: tuple[RewardTerm, ...]
    """At least one."""

    def __call__(self, requests: Sequence[RewardRequest]) -> list[Reward | RewardFailure]:
        """Return for each answer the weighted sum, or a failure that names its term."""
        by_term = [call_reward_function(term.function, requests, skip_failures=True) for term in self.terms]
        return [self._total(rewards) for rewards in zip(*by_term, strict=True)]

    def _total(self, rewards: Sequence[Reward | RewardFailure]) -> Reward | RewardFailure:
        whole, by_token = 0.0, None
        for term, reward in zip(self.terms, rewards, strict=True):
            if isinstance(reward, RewardFailure):
                return replace(reward, reason=f"of {term.name}: {reward.reason}")
            if not isinstance(reward, tuple):
                whole += term.weight * reward
            elif by_token is None:
                by_token = [term.weight * number for number in reward]
            else:
                by_token = [
                    sum_ + term.weight * number for sum_, number in zip(by_token, reward, strict=True)
                ]
        if by_token is None:
            return whole
        if by_token:  # an answer without tokens has no token to add the number to
            by_token[-1] += whole
        return tuple(by_token)


def in_process_parts(function: RewardFunction) -> tuple[InProcessReward, ...]:
    """Return those functions of a reward that this process calls."""
    if isinstance(function, RewardSum):
        return tuple(part for term in function.terms for part in in_process_parts(term.function))
    return (function,) if isinstance(function, InProcessReward) else ()


def parse_reward_function(
    text: str, *, over_http: Callable[[str], RewardFunction], by_name: Callable[[str], RewardFunction]
) -> RewardFunction:
    """Return the reward function that a text names.

    The text is `module:function`, the address of a reward server, or a weighted sum of these, separated by
    ` + `: `rules:exact + 0.5 * rules:brief + 2 * http://host:8000/score`.

    Args:
        text: as above.
        over_http: returns the reward function of an address.
        by_name: returns the reward function of `module:function`.

    Raises:
        RewardError: another form, or no such module or function; the message says which.
    """
    terms = []
    for part in _PLUS.split(text.strip()):
        match = _TERM.fullmatch(part)
        try:
            weight = float(match["weight"] or 1.0) if match else None
        except ValueError:
            weight = None
        if match is None or weight is None or not math.isfinite(weight):
            raise RewardError(
                f"{part!r} in the reward {text!r} is not of the form [weight *] module:function or "
                "[weight *] http://…; separate terms by ' + '"
            )
        name = match["name"]
        is_address = name.startswith(("http://", "https://"))
        terms.append(
            RewardTerm(
                name=name,
                weight=weight,
                function=over_http(name) if is_address else by_name(name),
            )
        )
    if len(terms) == 1 and terms[0].weight == 1.0:
        return terms[0].function
    return RewardSum(terms=tuple(terms))
