"""Micro-batches through a sharded model: one pipeline schedule for every layout and every objective."""

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
    postponed: list[OomGuard] | None = None,
) -> list[Output]:
    """Return what `step` gives for each micro-batch, in order, on the last stage; elsewhere nothing.

    Each micro-batch goes forward through all stages and, unless `forward_only`, backward; gradients are
    summed over micro-batches, over dp and cp, and lie where `optimizer` expects them. A loss is a sum
    over the rows that this rank holds, already divided by its *global* denominator: nothing is averaged.

    Every rank of the topology calls this with the same kind of work; ranks that share a pipeline or a
    context-parallel group with the same micro-batches. Data-parallel ranks may have different numbers,
    and none at all: such a rank adds nothing to the gradients, but has to take part in their reduction.

    Args:
        chunks: this rank's model chunks, wrapped for training or bare.
        micro_batches: on the rank's device.
        step: `(model, hidden_TD, index) -> (loss, output)`, called on the last stage with the last
            hidden states of micro-batch `index`; the loss is None when `forward_only`.
        topology: layout and groups.
        forward_only: no gradients, nothing kept for backward.
        postponed: takes the schedule's attempt, so that no stage waits for the others at its end; before
            its results are used, or another kind of schedule runs, the caller lets the ranks agree.

    Raises:
        OutOfMemory: on every rank of the schedule where memory ran out on one; `fitting` runs it again.
        ValueError: memory ran out where that cannot be, see `out_of_memory`.
    """
    return run_models(
        [chunks],
        [micro_batches],
        step,
        topology=topology,
        forward_only=forward_only,
        postponed=postponed,
    )


def run_models(
    models: Sequence[Chunks],
    micro_batches: Sequence[Sequence[PackedTokens]],
    step: Step,
    *,
    topology: Topology,
    forward_only: bool,
    postponed: list[OomGuard] | None = None,
    times: PassTimes | None = None,
) -> list[Output]:
    """Return what `run_micro_batches` does, of several models whose micro-batches share one schedule.

    Stages wait once for the pipeline to fill and to drain, and not once a model.

    Args:
        models: this rank's chunks of each. Shapes may differ, the dtype and whether gradients are reduced
            during backward may not.
        micro_batches: of each model, which go through the schedule in this order.
        step: called with the index over all models' micro-batches, as results are ordered.
        topology, forward_only, postponed: as for `run_micro_batches`.
        times: is told each model's passes, by its role, which are spans of that name then too.

    Raises:
        OutOfMemory: as `run_micro_batches`; its index counts over all models' micro-batches.
        ValueError: likewise; or the models' dtypes differ.
    """
    if forward_only and not any(micro_batches):
        return []
    layout = topology.layout
    shares = [
        [share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp) for packed in own]
        for own in micro_batches
    ]
    # What communicates, or changes weights, where backward ends.
    is_final = not forward_only and any(map(communicates_in_backward, models))
    turns = scheduled_micro_batches(shares, _filler(topology), layout, is_final=is_final)
    attempt = OomGuard(turns, topology, is_final=is_final)
    passes = _Passes(attempt=attempt, times=times)
    config = shared_config(models)
    chunks = [MultiModelChunk(group, config) for group in zip(*models, strict=True)]
    run = partial(
        schedules.get_forward_backward_func(),
        **_communication(config, models, turns, topology),
        forward_step_func=partial(_forward_step, step, passes),
        data_iterator=[iter(enumerate(turns)) for _ in chunks],
        model=chunks,
        num_microbatches=len(turns),
        seq_length=0,  # every micro-batch has its own shape, see stage_link
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if forward_only:
        with torch.no_grad():
            outputs = run(collect_non_loss_data=True)
    else:
        with _own_backward(models, turns, passes, topology):
            outputs = run()
    if postponed is None:
        attempt.agree(forward_only=forward_only)
    else:
        postponed.append(attempt)
    return [output for output, turn in zip(outputs, turns, strict=bool(outputs)) if turn.index is not None]


def collect_rows(
    outputs: Sequence[torch.Tensor],
    micro_batches: Sequence[PackedTokens],
    num_columns: int,
    *,
    topology: Topology,
) -> list[torch.Tensor]:
    """Return per-row results of the last stage as whole streams, on every rank of the pipeline.

    Args:
        outputs: fp32 `[T / cp, num_columns]` a micro-batch on the last stage; unused elsewhere.
        micro_batches: the streams.
        num_columns: results a row.
        topology: the context-parallel group gathers, the pipeline group broadcasts: one collective each.

    Returns:
        fp32 `[T, num_columns]` a micro-batch.
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
    """Gather each context-parallel rank's rows of all micro-batches and put them in their streams' order."""
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
    """What passes of a schedule run in."""

    attempt: OomGuard
    times: PassTimes | None

    @contextlib.contextmanager
    def one(self, model: GLMModel, name: str) -> Iterator[None]:
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
    place, turn = next(data)
    chunk = chunks.take(turn)
    hidden = None
    if not passes.attempt.has_failed:
        with passes.attempt.guard(place), passes.one(unwrap(chunk), "forward"):
            hidden = chunk(turn.share)
    if hidden is None:
        hidden = zero_output(unwrap(chunk), turn.share)
    return hidden, partial(_apply, step, unwrap(chunk), turn.index, passes)


def _apply(
    step: Step,
    model: GLMModel,
    index: int | None,
    passes: _Passes,
    hidden_TD: torch.Tensor,
    non_loss_data: bool = False,
) -> Any:
    """Answer Megatron-core's schedule: an output, or (loss, tokens, of which there are none, output)."""
    loss, output = None, None
    if index is not None and not passes.attempt.has_failed:
        with passes.attempt.guard(), passes.one(model, "head"):
            loss, output = step(model, hidden_TD, index)
    if non_loss_data:
        return output
    if loss is None or not loss.requires_grad:
        loss = _zero_loss(model, hidden_TD)
    # A loss that is not finite gets a gradient of NaN: an optimizer in backward sees the gradient alone.
    # And a copy, because the schedule empties the tensor in its hands, and the output may share its memory.
    is_finite = loss.detach().isfinite()
    return loss * torch.where(is_finite, 1.0, torch.nan), _no_tokens(hidden_TD), output


def _own_backward(
    models: Sequence[Chunks], turns: Sequence[ScheduledMicroBatch], passes: _Passes, topology: Topology
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which each backward pass is a span that may run out of memory."""
    order = stage_order(topology.layout, len(turns), stage=topology.pp_rank)
    coming = (turns[one.micro_batch] for one in order if one.kind == "backward")

    def spanned(model: GLMModel, backward_step: BackwardStep, *given: Any) -> Any:
        with passes.one(model, "backward"):
            return backward_step(*given)

    def in_turn(backward_step: BackwardStep, *given: Any) -> Any:
        turn = next(coming)
        chunks = models[turn.model]
        with backward_of(chunks, is_last=turn.is_last):
            step = partial(spanned, unwrap(chunks[0]), backward_step)
            return backward_or_zeros(passes.attempt, step, *given)

    return around_backward_steps(in_turn)


def _zero_loss(model: GLMModel, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Return 0 with a gradient of zero for the hidden states and the head, since other ranks wait for it."""
    tensors = [hidden_TD, *model.head_weights()]
    return sum(tensor[:0].sum(dtype=torch.float32) for tensor in tensors)


def _communication(
    config: TransformerConfig,
    models: Sequence[Chunks],
    turns: Sequence[ScheduledMicroBatch],
    topology: Topology,
) -> dict[str, Any]:
    layout = topology.layout
    if layout.pp == 1:
        return {}
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    sizes = [unwrap(chunks[0]).config.hidden_size for chunks in models]
    shapes = [[turn.share.packed.num_tokens // split, 1, sizes[turn.model]] for turn in turns]
    link = stage_link(config, topology, shapes, layout.vpp)
    return {"p2p_communicator": link, "pg_collection": ProcessGroupCollection.use_mpu_process_groups()}


def _no_tokens(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int, device=tensor.device)


def _filler(topology: Topology) -> ContextShard:
    """Return empty work: at least one micro-batch is needed, and interleaved a multiple of pp."""
    layout = topology.layout
    token = torch.zeros(1, dtype=torch.int64, device=topology.device)
    packed = pack([token], multiple=layout.token_multiple)
    return share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp)
