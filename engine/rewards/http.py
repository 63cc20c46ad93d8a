"""Rewards from a server over HTTP.

The protocol, one batch per POST, JSON in both directions:

    {"requests": [{"prompt": str | null, "response": str | null, "prompt_tokens": [int …],
                   "response_tokens": [int …], "is_finished": bool, "extra": {…}} …]}
    {"rewards": [number, or a list of one number per response token, …]}

with as many rewards as requests, in their order, and status 200. `extra` holds the other fields of the
prompt's record. `examples/reward_server.py` is such a server.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from glm_rlhf.engine.rewards.function import Reward, RewardFailure, RewardRequest

_MAX_BYTES = 64 * 2**20
_MAX_PAUSE_S = 30.0
_RETRIED_STATUS = (408, 429)  # client errors that may pass: timeout, too many requests


class _PermanentError(Exception):
    """A response that a retry would not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReward:
    """A reward function that requests rewards from a server.

    A batch is sent again, at most `retries` times, after pauses that double from `pause_s` to 30 s: when the
    connection fails or times out, on status 5xx, 408 or 429, and on a response that breaks the protocol.
    If that fails, its answers and those of later batches of the call get a `RewardFailure`: a call lasts at
    most (retries + 1) · (timeout_s + pause) longer than the server works.
    """

    url: str
    """Address of the POST, http or https."""
    timeout_s: float = 30.0
    """Longest time of a request in seconds, from the connection to the last byte of the response."""
    retries: int = 3
    """Most retries per batch."""
    batch_size: int = 64
    """Most answers per POST."""
    pause_s: float = 0.5
    """Pause before the first retry, in seconds."""

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
            except (OSError, ValueError, http.client.HTTPException) as error:
                reasons.append(f"{type(error).__name__}: {error}")
        return RewardFailure(
            reason=f"{self.url} gave none in {len(reasons)} attempts, the last error: {reasons[-1]}"
        )

    def _post(self, body: bytes, num_answers: int) -> list[Reward]:
        """Return the rewards of one POST.

        Raises:
            _PermanentError: a retry would fail too.
            OSError, ValueError, HTTPException: a retry may succeed.
        """
        deadline = time.monotonic() + self.timeout_s
        request = urllib.request.Request(
            self.url, data=body, headers={"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                answer = json.loads(_read(response, deadline, self.timeout_s))
        except urllib.error.HTTPError as error:
            with error:
                message = f"status {error.code}, {error.read(500).decode(errors='replace')!r}"
            if 400 <= error.code < 500 and error.code not in _RETRIED_STATUS:
                raise _PermanentError(message) from error
            raise OSError(message) from error
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


def _read(response: http.client.HTTPResponse, deadline: float, timeout_s: float) -> bytes:
    """Return the body; its bytes may come slowly, but all before the deadline."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > _MAX_BYTES:
            raise ValueError(f"the response is longer than {_MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the response was not complete after {timeout_s} s")
    return b"".join(parts)
