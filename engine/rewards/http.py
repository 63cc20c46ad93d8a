"""Rewards from a server over HTTP.

The contract, one batch a POST, JSON both ways:

    {"requests": [{"prompt": str | null, "response": str | null, "prompt_tokens": [int …],
                   "response_tokens": [int …], "is_finished": bool, "extra": {…}} …]}
    {"rewards": [number, or a list of one number a response token, …]}

with as many rewards as requests, in their order, and status 200. `extra` holds further fields of the
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
_PASSING_STATUS = (408, 429)  # of the client's faults, those that may be over when one asks again


class _Refused(Exception):
    """An answer that would be the same when asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReward:
    """A reward function that asks a server.

    A batch is asked for again, at most `retries` times, after pauses that double from `pause_s` to 30 s:
    when nobody answers, not in time, with a status of 5xx, 408 or 429, or with what is not of the contract.
    What then has no reward is a `RewardFailure`, and further batches of the same call are not asked for: a
    call lasts at most (retries + 1) · (timeout_s + pause) longer than the server works.
    """

    url: str
    """Where to POST, http or https."""
    timeout_s: float = 30.0
    """Longest that an answer may take, from the connection to its last byte."""
    retries: int = 3
    """How often a batch is asked for again."""
    batch_size: int = 64
    """Most answers in a POST."""
    pause_s: float = 0.5
    """Pause before the first time that a batch is asked for again."""

    def __call__(self, requests: Sequence[RewardRequest]) -> list[Reward | RewardFailure]:
        """Return a reward or a fault for each answer."""
        found: list[Reward | RewardFailure] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            answer = self._ask_until_answered(batch)
            if isinstance(answer, RewardFailure):
                return found + [answer] * (len(requests) - start)
            found += answer
        return found

    def _ask_until_answered(self, batch: Sequence[RewardRequest]) -> list[Reward] | RewardFailure:
        body = json.dumps({"requests": [_in_json(request) for request in batch]}).encode()
        reasons: list[str] = []
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.pause_s * 2 ** (attempt - 1), _MAX_PAUSE_S))
            try:
                return self._ask(body, len(batch))
            except _Refused as error:
                reasons.append(str(error))
                break
            except (OSError, ValueError, http.client.HTTPException) as error:
                reasons.append(f"{type(error).__name__}: {error}")
        return RewardFailure(
            reason=f"{self.url} gave none in {len(reasons)} attempts, at last: {reasons[-1]}"
        )

    def _ask(self, body: bytes, num_answers: int) -> list[Reward]:
        """Return the rewards of one POST.

        Raises:
            _Refused: asking again is of no use.
            OSError, ValueError, HTTPException: it may be.
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
                words = f"status {error.code}, {error.read(500).decode(errors='replace')!r}"
            if 400 <= error.code < 500 and error.code not in _PASSING_STATUS:
                raise _Refused(words) from error
            raise OSError(words) from error
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise ValueError('the answer is not of the form {"rewards": […]}')
        if len(rewards) != num_answers:
            raise ValueError(f"{len(rewards)} rewards came for {num_answers} answers")
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
    """Return the body, however slowly its bytes drip, up to the deadline."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > _MAX_BYTES:
            raise ValueError(f"the answer is longer than {_MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer was not complete after {timeout_s} s")
    return b"".join(parts)
