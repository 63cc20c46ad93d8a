"""A reward function that is called in worker processes, where a call that does not return is ended."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from glm_rlhf.engine.rewards.function import (
    Reward,
    RewardError,
    RewardFailure,
    RewardRequest,
    call_reward_function,
    import_reward_function,
)
from glm_rlhf.engine.workers.messages import Call
from glm_rlhf.engine.workers.pool import CallRaised, WorkerPool
from glm_rlhf.engine.workers.process import WorkerDied, WorkerTimeout


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReward:
    """A reward function that a worker of a pool imports and calls; what it returns is checked there."""

    name: str
    """`module:function`."""
    pool: WorkerPool
    """Of the processes that call it; not started on ranks that do not call."""

    def __call__(self, requests: Sequence[RewardRequest]) -> list[Reward | RewardFailure]:
        """Return a reward or a failure for each answer; all fail where the call takes too long or its process
        ends."""
        # A view of a dict, say, cannot be pickled.
        carried = [replace(request, extra=dict(request.extra)) for request in requests]
        try:
            rewards = self.pool.call(f"{__name__}:score", self.name, carried)
            return cast(list[Reward | RewardFailure], rewards)
        except WorkerTimeout:
            reason = (
                f"the reward function {self.name} did not return within {self.pool.timeout_s:g} s "
                "(reward.function_timeout_s); its process was ended"
            )
        except WorkerDied as error:
            reason = f"the process of the reward function {self.name} {error} during the call"
        except CallRaised as error:
            reason = f"the reward function {self.name} raised {error}"
            failure = RewardFailure(reason=reason, traceback=error.raised.traceback or None)
            return [failure] * len(requests)
        except OSError as error:
            reason = f"no process for the reward function {self.name} can be started: {error}"
        return [RewardFailure(reason=reason)] * len(requests)


def start_workers(pool: WorkerPool, names: Sequence[str]) -> None:
    """Start the processes of a pool, each of which imports the reward functions.

    Raises:
        RewardError: a function cannot be imported; the message says which and why.
    """
    functions = " and ".join(names)
    try:
        pool.start(Call(function=f"{__name__}:prepare", arguments=(tuple(names),)))
    except CallRaised as error:
        raised = error.raised
        sentence = raised.message if raised.kind == RewardError.__name__ else f"{functions}: {error}"
        raise RewardError(sentence, traceback_text=raised.traceback) from None
    except WorkerTimeout:
        raise RewardError(
            f"{functions} could not be imported within {pool.timeout_s:g} s (reward.function_timeout_s)"
        ) from None
    except WorkerDied as error:
        raise RewardError(f"the process that imported {functions} {error}") from None
    except OSError as error:
        raise RewardError(f"no process for {functions} can be started: {error}") from error


def prepare(names: Sequence[str]) -> None:
    """Import reward functions; runs in a worker."""
    for name in names:
        import_reward_function(name)


def score(name: str, requests: list[RewardRequest]) -> list[Reward | RewardFailure]:
    """Return the checked rewards of a function; runs in a worker."""
    return call_reward_function(import_reward_function(name), requests, skip_failures=True)
