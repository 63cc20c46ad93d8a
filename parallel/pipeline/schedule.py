"""The pipeline schedule of micro-batches through a sharded model, for every layout and objective."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from glm_rlhf.parallel.model.packing import ContextShard, PackedTokens, pack, share
from glm_rlhf.parallel.pipeline.multi_model import (
    Chunks,
    check_one_dtype,
    communicates_in_backward,
    scheduled_micro_batches,
)
from glm_rlhf.parallel.pipeline.oom import OomGuard
from glm_rlhf.parallel.pipeline.stage_run import StageRun, Step
from glm_rlhf.parallel.pipeline.timing import PassTimes
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.pipeline_order import stage_actions


def run_micro_batches(
    chunks: Chunks,
    micro_batches: Sequence[PackedTokens],
    step: Step,
    *,
    topology: Topology,
    forward_only: bool,
    deferred: list[OomGuard] | None = None,
) -> list[Any]:
    """Return the outputs of `step` per micro-batch, in order, on the last stage; elsewhere nothing.

    Each micro-batch goes forward through all stages and, unless `forward_only`, backward; gradients are
    summed over micro-batches, over dp and cp, in the buffers of the training state. A loss is a sum over the
    rows that this rank holds, already divided by its *global* denominator: nothing is averaged.

    Every rank of the topology calls this with the same arguments except for the micro-batches; ranks of one
    pipeline and context-parallel group with the same micro-batches. Data-parallel ranks may have different
    numbers of micro-batches, or none: such a rank adds nothing to the gradients, but must take part in their
    reduction.

    Args:
        chunks: this rank's model chunks, wrapped for training or bare.
        micro_batches: on the rank's device.
        step: `(model, hidden_TD, index) -> (loss, output)`, called on the last stage with the final
            hidden states of micro-batch `index`; the loss is None when `forward_only`.
        topology: layout and groups.
        forward_only: no gradients, nothing kept for backward.
        deferred: receives the schedule's guard, so that no stage waits for the others at its end; the caller
            calls `raise_if_failed` before it uses the results or runs another kind of schedule.

    Raises:
        OutOfMemory: on every rank of the schedule if memory ran out on one; `oom_retry` repeats it.
        ValueError: memory ran out and the schedule cannot be repeated, see `oom`.
    """
    return run_models(
        [chunks],
        [micro_batches],
        step,
        topology=topology,
        forward_only=forward_only,
        deferred=deferred,
    )


def run_models(
    models: Sequence[Chunks],
    micro_batches: Sequence[Sequence[PackedTokens]],
    step: Step,
    *,
    topology: Topology,
    forward_only: bool,
    deferred: list[OomGuard] | None = None,
    times: PassTimes | None = None,
) -> list[Any]:
    """Return the result of `run_micro_batches` for several models whose micro-batches share one schedule.

    The pipeline fills and drains once, and not once per model.

    Args:
        models: this rank's chunks of each. Shapes may differ; the dtype, and whether gradients are reduced
            during backward, must not.
        micro_batches: of each model, in the order of the schedule.
        step: called with the index over all models' micro-batches, in the order of the results.
        topology, forward_only, deferred: as for `run_micro_batches`.
        times: records each model's passes, by its role; the passes are spans of that name too.

    Raises:
        OutOfMemory: as `run_micro_batches`; its index counts over all models' micro-batches.
        ValueError: as `run_micro_batches`; or the models' dtypes differ.
    """
    if forward_only and not any(micro_batches):
        return []
    check_one_dtype(models)
    layout = topology.layout
    shares = [
        [share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp) for packed in model_batches]
        for model_batches in micro_batches
    ]
    is_final = not forward_only and any(map(communicates_in_backward, models))
    scheduled = scheduled_micro_batches(shares, _padding(topology), layout, is_final=is_final)
    oom = OomGuard(scheduled, topology, is_final=is_final)
    # Every rank must do all actions in this order, also after an out-of-memory error: a rank that stops early
    # leaves its pipeline neighbours waiting in a receive. So a failed rank sends zeros until the end of the
    # schedule, where all ranks raise.
    stage = StageRun(
        models, scheduled, step, oom=oom, times=times, topology=topology, forward_only=forward_only
    )
    actions = stage_actions(layout, len(scheduled), stage=topology.pp_rank, forward_only=forward_only)
    with torch.set_grad_enabled(not forward_only):
        for action in actions:
            stage.run(action)
        stage.finish()
    if deferred is None:
        oom.raise_if_failed(forward_only=forward_only)
    else:
        deferred.append(oom)
    return [stage.outputs[place] for place in sorted(stage.outputs)]


def collect_rows(
    outputs: Sequence[torch.Tensor],
    micro_batches: Sequence[PackedTokens],
    num_columns: int,
    *,
    topology: Topology,
) -> list[torch.Tensor]:
    """Return per-row results of the last stage as whole streams, on every rank of the pipeline.

    Args:
        outputs: per micro-batch fp32 `[T / cp, num_columns]` on the last stage; unused elsewhere.
        micro_batches: the streams.
        num_columns: results per row.
        topology: the context-parallel group gathers, the pipeline group broadcasts: one collective each.

    Returns:
        Per micro-batch fp32 `[T, num_columns]`.
    """
    lengths = [packed.num_tokens for packed in micro_batches]
    if topology.is_last_stage:
        rows = _in_stream_order(torch.cat(list(outputs)), micro_batches, topology)
    else:
        rows = torch.empty(sum(lengths), num_columns, device=topology.device)
    if topology.layout.pp > 1:
        dist.broadcast(rows, topology.last_stage_rank, group=topology.pp_group)
    return list(rows.split(lengths))


def _in_stream_order(
    local: torch.Tensor, micro_batches: Sequence[PackedTokens], topology: Topology
) -> torch.Tensor:
    """Return the rows of all micro-batches, gathered from context-parallel ranks, in stream order."""
    cp = topology.layout.cp
    if cp == 1:
        return local
    gathered = local.new_empty(cp * local.shape[0], local.shape[1])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=topology.cp_group)
    parts = gathered.unflatten(0, (cp, -1)).split([p.num_tokens // cp for p in micro_batches], dim=1)
    streams = [
        part.flatten(0, 1)[share(packed, cp_size=cp).stream_order]
        for part, packed in zip(parts, micro_batches, strict=True)
    ]
    return torch.cat(streams)


def _padding(topology: Topology) -> ContextShard:
    """Return a padding micro-batch: a schedule needs at least one, an interleaved one a multiple of pp."""
    layout = topology.layout
    token = torch.zeros(1, dtype=torch.int64, device=topology.device)
    packed = pack([token], multiple=layout.token_multiple)
    return share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp)
