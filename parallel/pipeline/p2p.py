"""Point-to-point communication between pipeline stages with shapes that both sides know in advance.

All stages hold the same micro-batches, so each knows the length of the next one. Megatron-core exchanges
shapes before every send: one more message and one host synchronisation each, and with two stages of several
chunks the exchange mixes up the two directions between the same pair of ranks.
"""

from collections.abc import Sequence

from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig

from glm_rlhf.parallel.megatron_compat.stage_communicator import KnownShapesCommunicator
from glm_rlhf.parallel.runtime.topology import Topology


def stage_link(
    config: TransformerConfig, topology: Topology, shapes: Sequence[list[int]], num_chunks: int
) -> KnownShapesCommunicator:
    """Return Megatron-core's communicator for one schedule of micro-batches of known lengths.

    Args:
        config: of the model.
        topology: this rank's stage.
        shapes: [rows, 1, hidden size] of a rank's part of the residual stream per micro-batch, in order.
        num_chunks: model chunks per stage.
    """
    order = [(index, 0) for index in range(len(shapes))]
    if num_chunks > 1:
        group_size = config.microbatch_group_size_per_vp_stage
        order = get_schedule_table(len(shapes), num_chunks, group_size)
    is_first, is_last = topology.pp_rank == 0, topology.is_last_stage
    # Backward visits the chunks last to first. The model's first chunk receives nothing in forward, its
    # last chunk nothing in backward.
    return KnownShapesCommunicator(
        topology.pp_group,
        config,
        from_previous=(shapes[index] for index, chunk in order if not (is_first and chunk == 0)),
        from_next=(shapes[index] for index, chunk in order if not (is_last and chunk == 0)),
    )
