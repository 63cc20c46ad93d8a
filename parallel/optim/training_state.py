"""Training state of a sharded model: gradient buffers, gradient reduction, and the distributed optimizer."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from glm_rlhf.parallel.megatron_compat.cpu_patches import cuda_type_names
from glm_rlhf.parallel.megatron_compat.data_parallel import (
    cut_reference_cycles,
    gradient_buffers,
    weight_buffers,
)
from glm_rlhf.parallel.megatron_compat.distributed_optimizer import state_tensors
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.cpu_offload import CpuOffload
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """Hyper-parameters of one optimizer."""

    lr: float
    """Learning rate of the first step; `TrainingState.set_lr` changes it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms are exempt."""
    clip_grad: float = 1.0
    """Largest norm of the gradient over the whole model; 0 does not clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of an optimizer step."""

    is_applied: bool
    """False if the gradient was not finite: the weights are unchanged, except with `InBackwardState`."""
    grad_norm: float
    """Norm of the gradient over the whole model, before clipping."""


class TrainingState:
    """Owns the gradient buffers and the optimizer of one sharded model.

    Frozen parameters must have `requires_grad` false before they are wrapped.
    """

    def __init__(
        self,
        chunks: Sequence[GLMModel],
        settings: AdamSettings,
        *,
        topology: Topology,
        overlap_communication: bool = False,
    ) -> None:
        """Wrap `chunks` for training; every rank of the topology calls this.

        Args:
            chunks: this rank's model chunks, weights initialised: fp32 masters are copied from them.
            settings: of the optimizer.
            topology: gradients are summed over dp × cp, the optimizer state is sharded over it.
            overlap_communication: reduce gradients and gather weights while computing; see `gather_weights`.

        Raises:
            ValueError: the weights are float16, whose gradients would need loss scaling.
        """
        check_trainable(chunks)
        megatron = chunks[0].config
        self.topology = topology
        self.clip_grad = settings.clip_grad
        self.wait_for_readers: Callable[[], None] | None = None
        """Called before weights and moments change: returns when no save reads them any more."""
        data_parallel = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap_communication,
            overlap_param_gather=overlap_communication,
        )
        self.chunks = [
            DistributedDataParallel(
                chunk.config, data_parallel, chunk, disable_bucketing=index > 0 and _has_one_dtype(chunk)
            )
            for index, chunk in enumerate(chunks)
        ]
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.epsilon,
            bf16=megatron.bf16,
            params_dtype=megatron.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap_communication,
        )
        with cuda_type_names():
            self.optimizer: MegatronOptimizer = get_megatron_optimizer(
                config, self.chunks, use_gloo_process_groups=False
            )
        self._offloaded_state = CpuOffload(
            partial(_optimizer_tensors, self.optimizer, self.chunks), device=topology.device
        )
        for group in self.optimizer.param_groups:
            # Megatron-core applies the multiplier only in its own scheduler, which is not used here.
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        megatron.finalize_model_grads_func = partial(_finalize, topology)
        weakref.finalize(self, cut_reference_cycles, self.chunks)
        if overlap_communication:
            functions = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = functions if len(functions) > 1 else functions[0]
            self.gather_weights()

    @property
    def bare_chunks(self) -> list[GLMModel]:
        """This rank's chunks without the data-parallel wrapper."""
        return [chunk.module for chunk in self.chunks]

    def zero_grad(self) -> None:
        """Set every gradient to zero; before the first micro-batch of a step."""
        for gradients in self._gradient_buffers():
            gradients.untyped_storage().resize_(gradients.numel() * gradients.element_size())
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Use learning rate `lr` from the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)

    def step(self) -> StepResult:
        """Clip, update the weights and gather them over dp; every rank calls this together.

        With `overlap_communication` the next training step gathers them; see `gather_weights`.
        """
        return take_step(self)

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, after the schedule; every rank calls this together."""
        self._offloaded_state.wait()
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())  # over the world: equal on all ranks

    def apply(self, grad_norm: float) -> None:
        """Clip and update as `step` does, given the finite result of `grad_norm`."""
        parameters = self.optimizer.get_parameters()
        if self.clip_grad > 0.0 and parameters:  # a rank may own no trained weight
            with cuda_type_names():  # clipping asserts the CUDA type name
                clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm)
        if self.wait_for_readers is not None:
            self.wait_for_readers()
        self.optimizer.step_with_ready_grads()

    def offload(self) -> int:
        """Start to move the optimizer state to host memory, and free the gradient buffers.

        `zero_grad` allocates the buffers again; `step`, `prefetch` or `wait_for_state` restore the state.

        Returns:
            Bytes of device memory that are free when the copies are done.
        """
        if self.wait_for_readers is not None:
            self.wait_for_readers()
        self._offloaded_state.offload()
        num_bytes = self._offloaded_state.offloaded_bytes
        for gradients in self._gradient_buffers():
            num_bytes += gradients.numel() * gradients.element_size()
            gradients.untyped_storage().resize_(0)
        return num_bytes

    def prefetch(self) -> None:
        """Start to copy the optimizer state back to the device, overlapped with the work up to `step`."""
        self._offloaded_state.prefetch()

    def wait_for_state(self) -> None:
        """Wait until the optimizer state is on the device, before it is read or changed outside `step`."""
        self._offloaded_state.wait()

    def nonfinite_gradients(self) -> list[str]:
        """Return the names of this rank's weights whose gradient is not finite; valid until `zero_grad`.

        Of gradients that are sharded over dp a rank sees its own shard reduced, and the rest unreduced: the
        rank where the NaN or Inf comes from has the most.
        """
        return [
            name
            for chunk in self.chunks
            for name, weight in chunk.module.named_weights()
            if weight.requires_grad and not bool(weight.main_grad.isfinite().all())
        ]

    def _gradient_buffers(self) -> Iterator[torch.Tensor]:
        for chunk in self.chunks:
            yield from gradient_buffers(chunk)

    def gather_weights(self) -> None:
        """Gather now the weights that `overlap_communication` would gather during the next training step.

        Every rank calls it before weights are used outside a training step of all ranks: after `step` a
        data-parallel rank has old weights outside its own shard, and a forward pass on some ranks would wait
        for the rest. Does nothing without overlap.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


class Steppable(Protocol):
    """A training state whose gradient is complete."""

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient."""

    def apply(self, grad_norm: float) -> None:
        """Update the weights, given that norm."""


def take_step(state: Steppable) -> StepResult:
    """Take a step unless the gradient is not finite; every rank calls this."""
    norm = state.grad_norm()
    is_applied = math.isfinite(norm)
    if is_applied:
        state.apply(norm)
    return StepResult(is_applied=is_applied, grad_norm=norm)


def _optimizer_tensors(
    outer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel]
) -> Iterator[torch.Tensor]:
    """Yield the optimizer's tensors: moments, and fp32 weights that are not the model's parameters."""
    model_storages = {
        weights.untyped_storage().data_ptr() for chunk in chunks for weights in weight_buffers(chunk)
    }
    for tensor in state_tensors(outer):
        if tensor.untyped_storage().data_ptr() not in model_storages:
            yield tensor


def check_trainable(chunks: Sequence[GLMModel]) -> None:
    """Raise ValueError if the weights are float16, whose gradients would need loss scaling."""
    if chunks[0].config.params_dtype is torch.float16:
        raise ValueError("float16 weights cannot be trained, there is no loss scaling: use bf16 or fp32")


def _has_one_dtype(chunk: GLMModel) -> bool:
    """Return whether all trained parameters have one dtype, unlike a bf16 chunk with an fp32 value head.

    Without bucketing, different dtypes share a collective: gloo concatenates their tensors as one dtype and
    returns wrong numbers.
    """
    return len({parameter.dtype for parameter in chunk.parameters() if parameter.requires_grad}) < 2


def _finalize(
    topology: Topology, chunks: list[DistributedDataParallel], _num_tokens: object, **kwargs: object
) -> None:
    """Reduce gradients at the end of a schedule; losses are already divided by global denominators."""
    finalize_model_grads(chunks, None, **kwargs)
    sum_replicated_gradients(chunks, topology)


def sum_replicated_gradients(chunks: Sequence[torch.nn.Module], topology: Topology) -> None:
    """Sum the gradients of weights that several ranks hold copies of, in their buffers."""
    parameters = [
        p for chunk in chunks for p in chunk.parameters() if p.requires_grad and hasattr(p, "num_tp_replicas")
    ]
    gradients = [p.main_grad if hasattr(p, "main_grad") else p.grad for p in parameters]
    sum_replicas(parameters, gradients, topology)


def sum_replicas(
    parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor], topology: Topology
) -> None:
    """Sum the gradients of weights that several tensor-parallel ranks hold copies of, in place.

    These are the key/value projections of attention with fewer key/value heads than ranks. One all-reduce of
    (tp / copies) × their size over the tensor-parallel group; all its ranks call this.
    """
    if not parameters:
        return
    num_sets = topology.layout.tp // parameters[0].num_tp_replicas
    mine = topology.tp_rank // parameters[0].num_tp_replicas
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    sets = flat.new_zeros(num_sets, flat.shape[0])
    sets[mine] = flat
    dist.all_reduce(sets, group=topology.tp_group)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, total in zip(gradients, sets[mine].split(sizes), strict=True):
        gradient.copy_(total.view_as(gradient))
