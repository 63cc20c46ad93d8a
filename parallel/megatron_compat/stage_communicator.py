"""Megatron-core's sends between pipeline stages, without its exchange of shapes before each of them."""

from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig


class KnownShapesCommunicator(P2PCommunicator):
    """The communicator of one schedule, for a rank that knows beforehand what it will receive.

    Replaces the private method with which `variable_seq_lengths` asks the neighbours for shapes.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: TransformerConfig,
        *,
        from_previous: Iterable[list[int]],
        from_next: Iterable[list[int]],
    ) -> None:
        """Take the shapes [rows, 1, hidden size] that come, in order.

        Args:
            pp_group: the ranks of this pipeline.
            config: of the model.
            from_previous: activations, from the previous stage.
            from_next: gradients, from the next stage.
        """
        super().__init__(pp_group, config)
        self._from_previous = deque(from_previous)
        self._from_next = deque(from_next)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Return the shapes of what comes now from the previous and from the next stage."""
        nothing = [0, 0, 0]
        from_previous = self._from_previous.popleft() if recv_prev else nothing
        return from_previous, self._from_next.popleft() if recv_next else nothing
