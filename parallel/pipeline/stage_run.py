"""One pipeline stage in one schedule: executes its list of actions, one after the other.

The list of `spec.pipeline_order` says what comes when; here is how each action is done. Nothing else decides
the order: several models, padding, passes without gradients and the rest of a schedule in which memory ran
out are entries like any other.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.autograd.graph import GradientEdge, get_gradient_edge

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.pipeline.multi_model import Chunks, ScheduledMicroBatch, backward_of, unwrap
from glm_rlhf.parallel.pipeline.oom import OomGuard, zero_output
from glm_rlhf.parallel.pipeline.p2p import StageMessages
from glm_rlhf.parallel.pipeline.timing import PassTimes
from glm_rlhf.parallel.runtime.spans import heartbeat, span
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.pipeline_order import Action, Pass, Transfer

Step = Callable[[GLMModel, torch.Tensor, int], tuple[torch.Tensor | None, Any]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What a micro-batch leaves in a chunk until its backward pass."""

    input: torch.Tensor | None
    """Output of the previous chunk; None for the model's first."""
    root: torch.Tensor | GradientEdge | None
    """Where backward begins: the loss, or the output, whose values are freed; None where memory ran out."""


class StageRun:
    """Owns what is under way on this stage: inputs, gradients and messages of micro-batches."""

    def __init__(
        self,
        models: Sequence[Chunks],
        scheduled: Sequence[ScheduledMicroBatch],
        step: Step,
        *,
        oom: OomGuard,
        times: PassTimes | None,
        topology: Topology,
        forward_only: bool,
    ) -> None:
        """Begin a schedule.

        Args:
            models: this rank's chunks of each model, wrapped for training or bare.
            scheduled: the micro-batches, in order.
            step: called on the last stage, see `run_micro_batches`.
            oom: fails the schedule where memory runs out.
            times: records each model's passes; None for no records.
            topology: layout and groups.
            forward_only: nothing is kept for backward.
        """
        self.outputs: dict[int, Any] = {}
        """Output of `step` by place in the schedule, on the last stage."""
        self._models, self._scheduled, self._step = models, scheduled, step
        self._oom, self._times, self._topology = oom, times, topology
        self._forward_only = forward_only
        self._messages = StageMessages(topology)
        self._tensors: dict[tuple[str, int, int], torch.Tensor] = {}  # received for a pass, or left by one
        self._waiting: dict[tuple[int, int], _Waiting] = {}

    def run(self, action: Action) -> None:
        """Do one action."""
        if isinstance(action, Transfer):
            self._transfer(action)
        elif action.kind == "forward":
            self._forward(action)
        else:
            self._backward(action)

    def finish(self) -> None:
        """Wait for the last messages, and reduce the gradients of every model."""
        self._messages.finish()
        if self._forward_only:
            return
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for chunks in self._models:
            finalize = unwrap(chunks[0]).config.finalize_model_grads_func
            if finalize is not None:
                finalize(list(chunks), None, pg_collection=groups)

    def _transfer(self, action: Transfer) -> None:
        key = (action.tensor, action.micro_batch, action.chunk)
        if action.kind == "send":
            self._messages.send(action, self._tensors.pop(key))
            return
        config = self._chunk(action)[1].config
        layout = self._topology.layout
        num_parts = layout.cp * (layout.tp if layout.sequence_parallel else 1)
        num_tokens = self._scheduled[action.micro_batch].share.packed.num_tokens
        shape = [num_tokens // num_parts, 1, config.hidden_size]
        self._tensors[key] = self._messages.receive(action, shape, config.params_dtype)

    def _forward(self, action: Pass) -> None:
        heartbeat()
        item = self._scheduled[action.micro_batch]
        chunk, model = self._chunk(action)
        received = self._tensors.pop(("activation", action.micro_batch, action.chunk), None)
        if received is not None and not self._forward_only:
            received.requires_grad_()
        model.set_input_tensor(received)
        hidden = None
        if not self._oom.has_failed:
            with self._oom.guard(action.micro_batch), self._timed(model, "forward"):
                hidden = chunk(item.share)
        if hidden is None:
            hidden = zero_output(model, item.share)
        if model.post_process:
            root = self._head(action.micro_batch, model, hidden)
        else:
            self._tensors["activation", action.micro_batch, action.chunk] = hidden.detach()
            root = get_gradient_edge(hidden) if hidden.requires_grad else None
        if not self._forward_only:
            self._waiting[action.micro_batch, action.chunk] = _Waiting(received, root)

    def _head(self, micro_batch: int, model: GLMModel, hidden_TD: torch.Tensor) -> torch.Tensor | None:
        """Keep the output for a micro-batch; return its loss, None without gradients."""
        index = self._scheduled[micro_batch].index
        loss = None
        if index is not None:
            self.outputs[micro_batch] = None
            if not self._oom.has_failed:
                with self._oom.guard(), self._timed(model, "head"):
                    loss, self.outputs[micro_batch] = self._step(model, hidden_TD, index)
        if self._forward_only:
            return None
        if loss is None or not loss.requires_grad:
            loss = _zero_loss(model, hidden_TD)
        # A loss that is not finite gets a gradient of NaN: an optimizer in backward sees the gradient alone.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _backward(self, action: Pass) -> None:
        item = self._scheduled[action.micro_batch]
        chunks, model = self._models[item.model], self._chunk(action)[1]
        received = self._tensors.pop(("gradient", action.micro_batch, action.chunk), None)
        waiting = self._waiting.pop((action.micro_batch, action.chunk))
        if not self._oom.has_failed and waiting.root is not None:
            with (
                backward_of(chunks, is_last=item.is_last),
                self._oom.guard(),
                self._timed(model, "backward"),
            ):
                torch.autograd.backward(waiting.root, received)
        if waiting.input is not None:
            gradient = waiting.input.grad
            if gradient is None or self._oom.has_failed:
                gradient = torch.zeros_like(waiting.input)
            self._tensors["gradient", action.micro_batch, action.chunk] = gradient

    def _chunk(self, action: Action) -> tuple[torch.nn.Module, GLMModel]:
        """Return an action's chunk, as it is called and without its wrapper."""
        chunk = self._models[self._scheduled[action.micro_batch].model][action.chunk]
        return chunk, unwrap(chunk)

    @contextlib.contextmanager
    def _timed(self, model: GLMModel, name: str) -> Iterator[None]:
        """Run a pass through a chunk, or a part of one, as a span."""
        with contextlib.ExitStack() as stack:
            if self._times is not None:
                stack.enter_context(span(model.role))
                stack.enter_context(self._times.passing(model.role))
            stack.enter_context(span(name))
            yield


def _zero_loss(model: GLMModel, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Return 0 with a gradient of zero for the hidden states and the head, so that collectives still run."""
    tensors = [hidden_TD, *model.head_weights()]
    return sum(tensor[:0].sum(dtype=torch.float32) for tensor in tensors)
