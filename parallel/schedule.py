"""Micro-batches through a sharded model: one pipeline schedule for every layout and every objective."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection

from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.out_of_memory import Attempt, backward_or_zeros, stand_in
from glm_rlhf.parallel.packing import PackedTokens, TokenShare, pack, share
from glm_rlhf.parallel.schedule_order import num_fillers
from glm_rlhf.parallel.spans import make_progress, span
from glm_rlhf.parallel.stage_link import StageLink
from glm_rlhf.parallel.topology import Topology

Output = TypeVar("Output")
Step = Callable[[GLMModel, torch.Tensor, int], tuple[torch.Tensor | None, Output]]


def run_micro_batches(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[PackedTokens],
    step: Step,
    *,
    topology: Topology,
    forward_only: bool,
    postponed: list[Attempt] | None = None,
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
    if forward_only and not micro_batches:
        return []
    layout = topology.layout
    shares = [share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp) for packed in micro_batches]
    fillers = _fillers(len(shares), topology)
    # Fillers come first: reductions that overlap with backward wait for gradients of the last micro-batch.
    shares = fillers + shares
    # What has a context for accumulation communicates, or changes weights, where backward leaves it.
    is_final = not forward_only and unwrap(chunks[0]).config.no_sync_func is not None
    attempt = Attempt(shares, len(fillers), topology, is_final=is_final)
    run = partial(
        schedules.get_forward_backward_func(),
        **_communication(chunks, shares, topology),
        forward_step_func=partial(_forward_step, step, len(fillers), attempt),
        data_iterator=[iter(enumerate(shares)) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(shares),
        seq_length=0,  # every micro-batch has its own length, see StageLink
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if forward_only:
        with torch.no_grad():
            outputs = run(collect_non_loss_data=True)
    else:
        with _own_backward(attempt):
            outputs = run()
    if postponed is None:
        attempt.agree(forward_only=forward_only)
    else:
        postponed.append(attempt)
    return outputs[len(fillers) :]


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


def _forward_step(
    step: Step,
    num_fillers: int,
    attempt: Attempt,
    data: Iterator[tuple[int, TokenShare]],
    model: torch.nn.Module,
) -> tuple[torch.Tensor, Callable[..., Any]]:
    make_progress()
    place, token_share = next(data)
    hidden = None
    if not attempt.is_over:
        with attempt.enduring(place), span("forward"):
            hidden = model(token_share)
    if hidden is None:
        hidden = stand_in(unwrap(model), token_share)
    return hidden, partial(_apply, step, unwrap(model), place - num_fillers, attempt)


def _apply(
    step: Step,
    model: GLMModel,
    index: int,
    attempt: Attempt,
    hidden_TD: torch.Tensor,
    non_loss_data: bool = False,
) -> Any:
    """Answer Megatron-core's schedule: an output, or (loss, tokens, of which there are none, output).

    A filler has a negative index.
    """
    loss, output = None, None
    if index >= 0 and not attempt.is_over:
        with attempt.enduring(), span("head"):
            loss, output = step(model, hidden_TD, index)
    if non_loss_data:
        return output
    if loss is None or not loss.requires_grad:
        loss = _zero_loss(model, hidden_TD)
    # A loss that is not finite gets a gradient of NaN: an optimizer in backward sees the gradient alone.
    # And a copy, because the schedule empties the tensor in its hands, and the output may share its memory.
    is_finite = loss.detach().isfinite()
    return loss * torch.where(is_finite, 1.0, torch.nan), _no_tokens(hidden_TD), output


@contextlib.contextmanager
def _own_backward(attempt: Attempt) -> Iterator[None]:
    """Make each backward a span that may run out of memory: Megatron-core's schedule calls it by name."""
    backward_step = schedules.backward_step

    def spanned(*given: Any) -> Any:
        with span("backward"):
            return backward_step(*given)

    schedules.backward_step = partial(backward_or_zeros, attempt, spanned)
    try:
        yield
    finally:
        schedules.backward_step = backward_step


def _zero_loss(model: GLMModel, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Return 0 with a gradient of zero for the hidden states and the head, since other ranks wait for it."""
    tensors = [hidden_TD, *model.head_weights()]
    return sum(tensor[:0].sum(dtype=torch.float32) for tensor in tensors)


def _communication(
    chunks: Sequence[torch.nn.Module], shares: Sequence[TokenShare], topology: Topology
) -> dict[str, Any]:
    layout = topology.layout
    if layout.pp == 1:
        return {}
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    num_rows = [token_share.packed.num_tokens // split for token_share in shares]
    link = StageLink(unwrap(chunks[0]).config, topology, num_rows, len(chunks))
    return {"p2p_communicator": link, "pg_collection": ProcessGroupCollection.use_mpu_process_groups()}


def _no_tokens(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int, device=tensor.device)


def _fillers(num_real: int, topology: Topology) -> list[TokenShare]:
    """Return empty work: at least one micro-batch is needed, and interleaved a multiple of pp."""
    layout = topology.layout
    missing = num_fillers(layout, num_real)
    if not missing:
        return []
    token = torch.zeros(1, dtype=torch.int64, device=topology.device)
    packed = pack([token], multiple=layout.token_multiple)
    return [share(packed, cp_rank=topology.cp_rank, cp_size=layout.cp)] * missing


def unwrap(model: torch.nn.Module) -> GLMModel:
    """Return a chunk as it was before it was wrapped for training."""
    return model if isinstance(model, GLMModel) else unwrap(model.module)
