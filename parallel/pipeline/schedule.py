"""The pipeline schedule of micro-batches through a sharded model, for every layout and objective."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from glm_rlhf.parallel.megatron_compat.pipeline_schedule import BackwardStep, around_backward_steps
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import ContextShard, PackedTokens, pack, share
from glm_rlhf.parallel.pipeline.multi_model import (
    Chunks,
    MultiModelChunk,
    ScheduledMicroBatch,
    backward_of,
    communicates_in_backward,
    scheduled_micro_batches,
    shared_config,
    unwrap,
)
from glm_rlhf.parallel.pipeline.oom import OomGuard, backward_or_zeros, zero_output
from glm_rlhf.parallel.pipeline.p2p import stage_link
from glm_rlhf.parallel.pipeline.timing import PassTimes
from glm_rlhf.parallel.runtime.spans import heartbeat, span
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.pipeline_order import stage_order

Output = TypeVar("Output")
Step = Callable[[GLMModel, torch.Tensor, int], tuple[torch.Tensor | None, Output]]


def run_micro_batches(
    chunks: Chunks,
    micro_batches: Sequence[PackedTokens],
    step: Step,
    *,
    topology: Topology,
    forward_only: bool,
    deferred: list[OomGuard] | None = None,
) -> list[Output]:
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
) -> list[Output]:
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
    layout = topology.layout
    shares = [
        [share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp) for packed in model_batches]
        for model_batches in micro_batches
    ]
    is_final = not forward_only and any(map(communicates_in_backward, models))
    scheduled = scheduled_micro_batches(shares, _padding(topology), layout, is_final=is_final)
    oom = OomGuard(scheduled, topology, is_final=is_final)
    passes = _Passes(oom=oom, times=times)
    # Why `MultiModelChunk`: Megatron-core's schedule knows one model, whose gradients it reduces at the last
    # micro-batch. Here several models share a schedule, so the chunk selects the model per micro-batch, and
    # `_own_backward` recomputes Megatron's order to know which model's backward is next. Every rank must run
    # all micro-batches in this order, also after an out-of-memory error: a rank that stops early leaves its
    # pipeline neighbours waiting in a receive. So a failed rank sends zeros until the end of the schedule,
    # where all ranks raise.
    config = shared_config(models)
    chunks = [MultiModelChunk(group, config) for group in zip(*models, strict=True)]
    run = partial(
        schedules.get_forward_backward_func(),
        **_communication(config, models, scheduled, topology),
        forward_step_func=partial(_forward_step, step, passes),
        data_iterator=[iter(enumerate(scheduled)) for _ in chunks],
        model=chunks,
        num_microbatches=len(scheduled),
        seq_length=0,  # every micro-batch has its own shape, see stage_link
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if forward_only:
        with torch.no_grad():
            outputs = run(collect_non_loss_data=True)
    else:
        with _own_backward(models, scheduled, passes, topology):
            outputs = run()
    if deferred is None:
        oom.raise_if_failed(forward_only=forward_only)
    else:
        deferred.append(oom)
    pairs = zip(outputs, scheduled, strict=bool(outputs))
    return [output for output, micro_batch in pairs if micro_batch.index is not None]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """The context of all passes of a schedule."""

    oom: OomGuard
    times: PassTimes | None

    @contextlib.contextmanager
    def timed(self, model: GLMModel, name: str) -> Iterator[None]:
        """Run a pass through a chunk, or a part of one, as a span."""
        with contextlib.ExitStack() as stack:
            if self.times is not None:
                stack.enter_context(span(model.role))
                stack.enter_context(self.times.passing(model.role))
            stack.enter_context(span(name))
            yield


def _forward_step(
    step: Step, passes: _Passes, data: Iterator[tuple[int, ScheduledMicroBatch]], chunks: MultiModelChunk
) -> tuple[torch.Tensor, Callable[..., Any]]:
    heartbeat()
    position, micro_batch = next(data)
    chunk = chunks.select(micro_batch)
    hidden = None
    if not passes.oom.has_failed:
        with passes.oom.guard(position), passes.timed(unwrap(chunk), "forward"):
            hidden = chunk(micro_batch.share)
    if hidden is None:
        hidden = zero_output(unwrap(chunk), micro_batch.share)
    return hidden, partial(_apply, step, unwrap(chunk), micro_batch.index, passes)


def _apply(
    step: Step,
    model: GLMModel,
    index: int | None,
    passes: _Passes,
    hidden_TD: torch.Tensor,
    non_loss_data: bool = False,
) -> Any:
    """Return what Megatron-core's schedule expects: an output, or (loss, number of tokens, output)."""
    loss, output = None, None
    if index is not None and not passes.oom.has_failed:
        with passes.oom.guard(), passes.timed(model, "head"):
            loss, output = step(model, hidden_TD, index)
    if non_loss_data:
        return output
    if loss is None or not loss.requires_grad:
        loss = _zero_loss(model, hidden_TD)
    # A non-finite loss gets a gradient of NaN: an optimizer in backward sees the gradient alone. The product
    # is also a copy: the schedule frees the loss tensor's storage, which the output may share.
    is_finite = loss.detach().isfinite()
    return loss * torch.where(is_finite, 1.0, torch.nan), _no_tokens(hidden_TD), output


def _own_backward(
    models: Sequence[Chunks], scheduled: Sequence[ScheduledMicroBatch], passes: _Passes, topology: Topology
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which each backward is a span with an OOM guard and its model's `no_sync`."""
    order = stage_order(topology.layout, len(scheduled), stage=topology.pp_rank)
    upcoming = (scheduled[item.micro_batch] for item in order if item.kind == "backward")

    def timed_step(model: GLMModel, backward_step: BackwardStep, *args: Any) -> Any:
        with passes.timed(model, "backward"):
            return backward_step(*args)

    def guarded_step(backward_step: BackwardStep, *args: Any) -> Any:
        micro_batch = next(upcoming)
        chunks = models[micro_batch.model]
        with backward_of(chunks, is_last=micro_batch.is_last):
            step = partial(timed_step, unwrap(chunks[0]), backward_step)
            return backward_or_zeros(passes.oom, step, *args)

    return around_backward_steps(guarded_step)


def _zero_loss(model: GLMModel, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Return 0 with a gradient of zero for the hidden states and the head, so that collectives still run."""
    tensors = [hidden_TD, *model.head_weights()]
    return sum(tensor[:0].sum(dtype=torch.float32) for tensor in tensors)


def _communication(
    config: TransformerConfig,
    models: Sequence[Chunks],
    scheduled: Sequence[ScheduledMicroBatch],
    topology: Topology,
) -> dict[str, Any]:
    layout = topology.layout
    if layout.pp == 1:
        return {}
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    sizes = [unwrap(chunks[0]).config.hidden_size for chunks in models]
    shapes = [[item.share.packed.num_tokens // split, 1, sizes[item.model]] for item in scheduled]
    link = stage_link(config, topology, shapes, layout.vpp)
    return {"p2p_communicator": link, "pg_collection": ProcessGroupCollection.use_mpu_process_groups()}


def _no_tokens(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int, device=tensor.device)


def _padding(topology: Topology) -> ContextShard:
    """Return a padding micro-batch: a schedule needs at least one, an interleaved one a multiple of pp."""
    layout = topology.layout
    token = torch.zeros(1, dtype=torch.int64, device=topology.device)
    packed = pack([token], multiple=layout.token_multiple)
    return share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp)
