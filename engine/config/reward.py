"""The settings of the reward of PPO and `evaluate`."""

from typing import Literal

from glm_rlhf.engine.config.sections import Count, PathText, Seconds, frozen_section
from glm_rlhf.engine.config.training import CountOrZero


@frozen_section
class PPORewardSection:
    """Reward of an answer: a reward model, a reward function, or their sum."""

    path: PathText | None = None
    """Hugging Face folder of a reward model; null: none."""
    function: str | None = None
    """`module:function` that takes a list of RewardRequest and returns one number, or one number per token,
    for each; or the http(s) address of a reward server; or a weighted sum of these such as
    `rules:exact + 0.5 * http://host:8000`; null: none."""
    function_weight: float = 1.0
    """Weight of the function's reward; the reward model's weight is 1."""
    on_error: Literal["raise", "mask"] = "raise"
    """What to do where the function returns no finite reward: raise ends the run, mask excludes the answer
    from training."""
    timeout_s: Seconds = 30.0
    """Seconds after which a request to a reward server fails, from its connection to the last byte of the
    response."""
    retries: CountOrZero = 3
    """Retries of a request to a reward server that is down, slow or returns an invalid response."""
    batch_size: Count = 64
    """Most answers per request to a reward server."""
    concurrency: CountOrZero = 1
    """Most concurrent calls of the function: `ppo` scores finished answers while it generates others. 0: one
    call with all answers after generation, for a function that compares answers with each other; with
    `workers` 0 it is made on the main thread."""
    workers: CountOrZero | None = None
    """Processes that call `module:function`, per rank that calls it; null: as many as `concurrency`, at least
    one. A process that dies, or is in a call past `function_timeout_s`, is ended and replaced. 0: the
    function is called in the rank's own process, where a call past its time ends the run."""
    function_timeout_s: Seconds = 300.0
    """Seconds after which a call of `module:function` fails."""

    def __post_init__(self) -> None:
        if self.path is not None and "://" in self.path:
            raise ValueError(
                f"reward.path is {self.path}, an address: a reward server is a reward function, set "
                "reward.function to it"
            )
        if self.path is None and self.function is None:
            raise ValueError(
                "no reward is given: set reward.path to a reward model, or reward.function to module:function"
            )
