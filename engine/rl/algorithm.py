"""What an algorithm of RL is to the loop: which roles it needs, advantages, losses, and its own state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from glm_rlhf.engine.scoring.packed_batches import Streams
from glm_rlhf.engine.training.loss import Loss
from glm_rlhf.engine.training.step import RoleStep
from glm_rlhf.engine.types import Advantages, Experience, Rollouts, Signals
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an algorithm asks of an iteration. What it does not name is neither loaded nor computed."""

    trains: tuple[str, ...]
    """Roles in training, in the order of an optimizer step: `policy`, and `critic` where there is one."""
    reference: bool
    """Whether the reference scores the answers."""


class UpdateSection(Protocol):
    """The settings of an algorithm that the loop reads."""

    @property
    def epochs(self) -> int:
        """Epochs over the answers of an iteration."""

    @property
    def minibatches(self) -> int:
        """Mini-batches, each one optimizer step, per epoch."""

    @property
    def max_kl(self) -> float | None:
        """KL from the old policy, in nats per token, at which an update ends; None: never."""

    @property
    def max_logprob_gap(self) -> float:
        """Largest mean difference, in nats, at which the sampler's logprobs are the old ones."""

    @property
    def overlap_scoring(self) -> bool:
        """Whether models score finished answers in idle slots of the pipeline."""


class Algorithm(Protocol):
    """An algorithm on an iteration's answers. Every rank has one and calls it in the same order."""

    @property
    def section(self) -> UpdateSection:
        """Its settings."""

    def needs(self) -> Needs:
        """Return which roles it needs; the same over a run."""

    def advantages(self, rollouts: Rollouts, signals: Signals, *, topology: Topology) -> Advantages:
        """Return what is learned from this data-parallel rank's answers.

        Args:
            rollouts: the answers, those without a reward excluded.
            signals: what scored them; None for what `needs` does not name.
            topology: its data-parallel group adds up what belongs to all answers.
        """

    def streams(self, experience: Experience) -> Streams:
        """Return the tensors [T] that the losses read, by name; `mask` (bool) is of the trained tokens."""

    def losses(self, experience: Experience) -> Mapping[str, Loss]:
        """Return the loss of each role in training."""

    def step_metrics(self, role: str, step: RoleStep) -> dict[str, float]:
        """Return the metrics of a role's optimizer step; `actor/ppo_kl` is held against `max_kl`."""

    def means(self, role: str, steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the metrics of an iteration from those of a role's steps, of which there may be none."""

    def after_iteration(self, experience: Experience) -> dict[str, float]:
        """Change the algorithm's own state after an update; return metrics of the state that it had."""

    def state(self) -> dict[str, float]:
        """Return what it carries from one iteration to the next, for a checkpoint."""

    def set_state(self, state: Mapping[str, float]) -> None:
        """Continue from what `state` returned."""
