"""Sends between pipeline stages whose shapes both sides know beforehand.

All stages hold the same micro-batches, so none has to ask how long the next one is. Megatron-core
would exchange shapes before every send: one more message and a host synchronisation each, and with
two stages of several chunks the exchange confuses the two directions between the same pair of ranks.
"""

from collections import deque
from collections.abc import Sequence

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig

from glm_rlhf.parallel.runtime.topology import Topology


class StageLink(P2PCommunicator):
    """Megatron-core's communicator for one schedule of micro-batches of known lengths."""

    def __init__(
        self, config: TransformerConfig, topology: Topology, shapes: Sequence[list[int]], num_chunks: int
    ) -> None:
        """Plan what this rank will receive.

        Args:
            config: of the model.
            topology: this rank's stage.
            shapes: [rows, 1, hidden size] of what a rank holds of the residual stream of each micro-batch,
                in order.
            num_chunks: model chunks of a stage.
        """
        super().__init__(topology.pp_group, config)
        order = [(index, 0) for index in range(len(shapes))]
        if num_chunks > 1:
            group_size = config.microbatch_group_size_per_vp_stage
            order = get_schedule_table(len(shapes), num_chunks, group_size)
        is_first, is_last = topology.pp_rank == 0, topology.is_last_stage
        # Backward visits the chunks last to first; the model's very first and last chunk receive nothing.
        self._from_previous = deque(shapes[index] for index, chunk in order if not (is_first and chunk == 0))
        self._from_next = deque(shapes[index] for index, chunk in order if not (is_last and chunk == 0))

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
