"""Rewards from a server over HTTP.

The protocol, one batch per POST, JSON in both directions:

    {"requests": [{"prompt": str | null, "response": str | null, "prompt_tokens": [int …],
                   "response_tokens": [int …], "is_finished": bool, "extra": {…}} …]}
    {"rewards": [number, or a list of one number per response token, …]}

with as many rewards as requests, in their order, and status 200. `extra` holds the other fields of the
prompt's record. `examples/reward_server.py` is such a server.
"""

import json
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

from glm_rlhf.engine.rewards.function import Reward, RewardError, RewardFailure, RewardRequest

_MAX_PAUSE_S = 30.0
_RETRIED_STATUS = (408, 429)  # client errors that may pass: timeout, too many requests


class _PermanentError(Exception):
    """A response that a retry would not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReward:
    """A reward function that requests rewards from a server.

    A batch is sent again, at most `retries` times, after pauses that double from `pause_s` to 30 s: when the
    connection fails or times out, on status 5xx, 408 or 429, and on a response that breaks the protocol.
    If that fails, its answers and those of later batches of the call get a `RewardFailure`. A batch lasts at
    most (retries + 1) · timeout_s and the pauses. A redirect is an error that is not retried. Connections are
    kept between batches; proxies of the environment are used as `bounded_post` says.
    """

    url: str
    """Address of the POST, http or https."""
    timeout_s: float = 30.0
    """Longest time of a request in seconds, from the look-up of the host's name to the last byte of the
    response."""
    retries: int = 3
    """Most retries per batch."""
    batch_size: int = 64
    """Most answers per POST."""
    pause_s: float = 0.5
    """Pause before the first retry, in seconds."""

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise RewardError(
                f"{self.url!r} is not the address of a reward server: http://host:port/path is required"
            )
        if "@" in parts.netloc:
            raise RewardError(
                f"the address of the reward server {parts.hostname} has a user name or password: reward "
                "servers are called without"
            )

    def __call__(self, requests: Sequence[RewardRequest]) -> list[Reward | RewardFailure]:
        """Return a reward or a failure for each answer."""
        rewards: list[Reward | RewardFailure] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            outcome = self._post_with_retries(batch)
            if isinstance(outcome, RewardFailure):
                return rewards + [outcome] * (len(requests) - start)
            rewards += outcome
        return rewards

    def _post_with_retries(self, batch: Sequence[RewardRequest]) -> list[Reward] | RewardFailure:
        body = json.dumps({"requests": [_in_json(request) for request in batch]}).encode()
        reasons: list[str] = []
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.pause_s * 2 ** (attempt - 1), _MAX_PAUSE_S))
            try:
                return self._post(body, len(batch))
            except _PermanentError as error:
                reasons.append(str(error))
                break
            except (OSError, ValueError, RecursionError) as error:
                reasons.append(f"{type(error).__name__}: {error}")
        return RewardFailure(
            reason=f"{self.url} gave none in {len(reasons)} attempts, the last error: {reasons[-1]}"
        )

    def _post(self, body: bytes, num_answers: int) -> list[Reward]:
        """Return the rewards of one POST.

        Raises:
            _PermanentError: a retry would fail too.
            OSError, ValueError, RecursionError: a retry may succeed.
        """
        from glm_rlhf.engine.rewards.bounded_post import post  # the client takes a while to import

        reply = post(self.url, body, timeout_s=self.timeout_s)
        status = f"status {reply.status}"
        if 300 <= reply.status < 400:
            raise _PermanentError(
                f"{status}, a redirect to {reply.location!r}, which is not followed: name the final address"
            )
        if not 200 <= reply.status < 300:
            message = f"{status}, {reply.body.decode(errors='replace')!r}"
            if 400 <= reply.status < 500 and reply.status not in _RETRIED_STATUS:
                raise _PermanentError(message)
            raise OSError(message)
        answer = json.loads(reply.body)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise ValueError('the response is not of the form {"rewards": […]}')
        if len(rewards) != num_answers:
            raise ValueError(f"the response has {len(rewards)} rewards for {num_answers} answers")
        return rewards


def _in_json(request: RewardRequest) -> dict[str, object]:
    return {
        "prompt": request.prompt,
        "response": request.response,
        "prompt_tokens": request.prompt_tokens,
        "response_tokens": request.response_tokens,
        "is_finished": request.is_finished,
        "extra": dict(request.extra),
    }
