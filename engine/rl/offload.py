"""What PPO's roles leave to host memory in the phases of an iteration that do not need it."""

from collections.abc import Collection, Sequence
from functools import partial

import torch

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState, InBackwardState
from glm_rlhf.parallel.runtime.cpu_offload import CpuOffload
from glm_rlhf.parallel.runtime.topology import Topology


class RoleOffload:
    """Owns what is parked of the roles, and moves it between the phases of an iteration.

    | parked | from | until |
    |---|---|---|
    | `optimizers`: states of policy and critic, and gradient buffers | generation | update |
    | `reference`, `reward`: weights | update, first generation | scoring |

    The policy's and critic's weights stay where they are.
    """

    def __init__(
        self,
        offloads: Collection[str],
        *,
        trained: Collection[AnyTrainingState],
        reference: Sequence[GLMModel],
        reward_model: Sequence[GLMModel] | None,
        topology: Topology,
    ) -> None:
        """Take the roles; nothing is parked yet.

        Args:
            parks: which of the table.
            trained: states of policy and critic.
            reference, reward_model: this rank's chunks; None for none.
            topology: layout and groups.

        Raises:
            ValueError: `optimizers` are to be parked, but change weights during backward.
        """
        self.offloads = frozenset(offloads)
        self._trained = list(trained) if "optimizers" in self.offloads else []
        if any(isinstance(state, InBackwardState) for state in self._trained):
            raise ValueError(
                "an optimizer in backward is not parked: leave optimizers out of train.offload, or set "
                "optimizer.in_backward to false"
            )
        models = {"reference": reference, "reward": reward_model}
        self._frozen = [
            CpuOffload(partial(_weights_of, chunks), device=topology.device, changes=False)
            for role, chunks in models.items()
            if role in self.offloads and chunks is not None
        ]
        self.offloaded_bytes = 0

    def before_generation(self) -> None:
        """Take optimizers to the host, and frozen models that are not there already."""
        self.offloaded_bytes = sum(state.offload() for state in self._trained)
        for offload in self._frozen:
            offload.offload()
            self.offloaded_bytes += offload.offloaded_bytes

    def before_scoring(self) -> None:
        """Bring the weights of frozen models back, for whoever is going to use them."""
        for offload in self._frozen:
            offload.wait()

    def before_update(self) -> None:
        """Take the weights of frozen models to the host, and begin to bring the optimizers back."""
        for offload in self._frozen:
            offload.offload()
        for state in self._trained:
            state.prefetch()


def _weights_of(chunks: Sequence[GLMModel]) -> list[torch.Tensor]:
    return [weight for chunk in chunks for weight in chunk.parameters()]
