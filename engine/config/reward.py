"""The settings of what judges answers."""

from typing import Literal

from glm_rlhf.engine.config.sections import Count, PathText, Seconds, frozen_section
from glm_rlhf.engine.config.training import CountOrZero


@frozen_section
class PPORewardSection:
    """What an answer is worth: a reward model, a function, or their sum."""

    path: PathText | None = None
    """Hugging Face folder of a reward model; null for none."""
    function: str | None = None
    """`module:function` that takes a list of RewardRequest and returns for each a number, or one a token;
    the http(s) address of a reward server; or a sum, `rules:exact + 0.5 * http://judge:8000`. null: none."""
    function_weight: float = 1.0
    """Factor of the function's reward."""
    on_error: Literal["raise", "mask"] = "raise"
    """What an answer that the function has no finite reward for does: end the run, or be left out."""
    timeout_s: Seconds = 30.0
    """Longest that a reward server may take for a batch."""
    retries: CountOrZero = 3
    """How often a batch is asked for again when the server is down, slow, or answers what it must not."""
    batch_size: Count = 64
    """Most answers that a reward server is sent at once."""
    concurrency: CountOrZero = 1
    """Most calls of the function at once, in background threads: `ppo` has answers judged as they end, while
    others are generated. 0 calls it once, with all answers, after the last has ended, on the main thread: for
    a function that compares answers with each other, sets signals, or computes in Python, which holds up what
    generates: in the background it gains nothing."""

    def __post_init__(self) -> None:
        if self.path is not None and "://" in self.path:
            raise ValueError(
                f"reward.path is {self.path}, an address: a reward server is a function, set "
                "reward.function to it"
            )
        if self.path is None and self.function is None:
            raise ValueError(
                "no reward is given: set reward.path to a reward model, or reward.function to module:function"
            )
