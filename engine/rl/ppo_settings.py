"""The numbers of PPO, as the engine takes them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    """How experience is estimated and learned from. Defaults are ours where the paper names none."""

    epochs: int = 1
    """Passes over an iteration's experience."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    clip: float = 0.2
    """The policy's ratio counts between 1 - clip and 1 + clip."""
    value_clip: float | None = 0.2
    """The critic may move this far from its old value, in units of value; None does not clip."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's lambda."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference inside the reward; where `kl_target` is set, its first value."""
    kl_target: float | None = None
    """KL a token, in nats, that the coefficient is steered towards; None keeps it fixed."""
    kl_horizon: int = 10_000
    """Sequences over which a steered coefficient follows."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL inside the reward."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    whitens_advantages: bool = False
    """Whether advantages get mean 0 and variance 1 over the iteration. Off, as in ChatGLM-RLHF."""
    max_kl: float | None = None
    """An update ends when a mini-batch's KL from the old policy, in nats a token, is above; None: never."""
    critic_warmup_iterations: int = 0
    """First iterations in which only the critic learns."""
    max_logprob_gap: float = 1e-4
    """The sampler's logprobs serve as the old ones when a sample of them differs from a forward pass by at
    most this, in nats on average; else all are computed again."""
    overlap_scoring: bool = True
    """Whether models score answers in turns of generation in which a pipeline stage would be idle."""
    micro_batch_tokens: int = 16384
    """Tokens of a micro-batch."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("minibatches", 1), ("micro_batch_tokens", 1), ("kl_horizon", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"ppo.{name} is {getattr(self, name)}, it must be at least {least}")
        if not 0 < self.clip < 1:
            raise ValueError(f"ppo.clip is {self.clip}, it must be between 0 and 1")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"ppo.value_clip is {self.value_clip}, it must be above 0, or null for none")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ppo.{name} is {getattr(self, name)}, it must be from 0 to 1")
        for name in ("kl_coef", "entropy_coef", "critic_warmup_iterations", "max_logprob_gap"):
            if getattr(self, name) < 0:
                raise ValueError(f"ppo.{name} is {getattr(self, name)}, it must not be negative")
