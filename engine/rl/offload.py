"""Which weights and optimizers wait in host memory in the phases of an iteration that do not need them."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState, InBackwardState
from glm_rlhf.parallel.optim.training_state import TrainingState
from glm_rlhf.parallel.runtime.cpu_offload import CpuOffload
from glm_rlhf.parallel.runtime.topology import Topology


class RoleOffload:
    """Owns what is offloaded of the roles, and moves it between the phases of an iteration.

    | offloaded | from | until |
    |---|---|---|
    | `optimizers`: states of the trained roles, and gradient buffers | generation | update |
    | `reference`, `reward`: weights | update, first generation | scoring |

    The weights of trained roles stay where they are.
    """

    def __init__(
        self,
        offloads: Collection[str],
        *,
        models: Mapping[str, Sequence[GLMModel]],
        states: Mapping[str, AnyTrainingState],
        topology: Topology,
    ) -> None:
        """Take the roles; nothing is offloaded yet.

        Args:
            offloads: which rows of the table.
            models: this rank's chunks by role.
            states: trained roles.
            topology: layout and groups.

        Raises:
            ValueError: `optimizers` are to be offloaded, but change weights during backward.
        """
        self.offloads = frozenset(offloads)
        self._trained: list[TrainingState] = []
        for state in states.values() if "optimizers" in self.offloads else ():
            if isinstance(state, InBackwardState):
                raise ValueError(
                    "an optimizer in backward is not offloaded: exclude optimizers from train.offload, or "
                    "set optimizer.in_backward to false"
                )
            self._trained.append(state)
        self._frozen = [
            CpuOffload(partial(_weights_of, chunks), device=topology.device, changes=False)
            for role, chunks in models.items()
            if role in self.offloads
        ]
        self.offloaded_bytes = 0

    def before_generation(self) -> None:
        """Offload optimizers, and frozen models that are not offloaded already."""
        self.offloaded_bytes = sum(state.offload() for state in self._trained)
        for offload in self._frozen:
            offload.offload()
            self.offloaded_bytes += offload.offloaded_bytes

    def before_scoring(self) -> None:
        """Bring the weights of frozen models back to the device."""
        for offload in self._frozen:
            offload.wait()

    def before_update(self) -> None:
        """Offload the weights of frozen models, and begin to bring the optimizers back."""
        for offload in self._frozen:
            offload.offload()
        for state in self._trained:
            state.prefetch()


def _weights_of(chunks: Sequence[GLMModel]) -> list[torch.Tensor]:
    return [weight for chunk in chunks for weight in chunk.parameters()]
