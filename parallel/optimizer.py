"""Training state of a sharded model: gradient buffers, their reductions, and the distributed optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from glm_rlhf.parallel.cpu import cuda_type_names
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """Hyper-parameters of one optimizer."""

    lr: float
    """Learning rate of the first step; `TrainingState.set_lr` changes it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean and of the running mean square."""
    epsilon: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms are exempt."""
    clip_grad: float = 1.0
    """Largest norm of the gradient over the whole model; 0 does not clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What an optimizer step did."""

    is_applied: bool
    """False when the gradient was not finite: the weights are what they were."""
    grad_norm: float
    """Norm of the gradient over the whole model, before clipping."""


class TrainingState:
    """Owns the gradient buffers and the optimizer of one sharded model."""

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
            chunks: this rank's model chunks, weights filled: fp32 masters are copied from them.
            settings: of the optimizer.
            topology: gradients are summed over dp × cp, the optimizer's state is split over it.
            overlap_communication: reduce gradients and gather weights while computing.
        """
        self.topology = topology
        self.is_bf16 = chunks[0].config.bf16
        data_parallel = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap_communication,
            overlap_param_gather=overlap_communication,
        )
        self.chunks = [
            DistributedDataParallel(chunk.config, data_parallel, chunk, disable_bucketing=index > 0)
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
            clip_grad=settings.clip_grad,
            bf16=self.is_bf16,
            params_dtype=chunks[0].config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap_communication,
        )
        with cuda_type_names():
            self.optimizer: MegatronOptimizer = get_megatron_optimizer(
                config, self.chunks, use_gloo_process_groups=False
            )
        megatron = chunks[0].config
        megatron.finalize_model_grads_func = self._finalize
        if overlap_communication:
            functions = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = functions if len(functions) > 1 else functions[0]

    def zero_grad(self) -> None:
        """Make every gradient zero; before the first micro-batch of a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Use learning rate `lr` from the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)

    def step(self) -> StepResult:
        """Clip, update the weights and gather them over dp; every rank calls this together."""
        with cuda_type_names():  # clipping asserts the type's name too
            is_applied, grad_norm, _ = self.optimizer.step()
        return StepResult(is_applied=is_applied, grad_norm=float(grad_norm or 0.0))

    def _finalize(self, chunks: list[DistributedDataParallel], _num_tokens: object, **kwargs: object) -> None:
        """Reduce gradients at the end of a schedule; our losses are divided by tokens already."""
        finalize_model_grads(chunks, None, **kwargs)
        sum_replicated_gradients(chunks, self.topology)


def sum_replicated_gradients(chunks: Sequence[torch.nn.Module], topology: Topology) -> None:
    """Add up the gradients of weights of which several tensor-parallel ranks hold a copy.

    These are the key/value projections of attention with fewer key/value heads than ranks. One
    all-reduce over the tensor-parallel group of (tp / copies) × their size; all ranks of it call.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters() if hasattr(p, "num_tp_replicas")]
    if not parameters:
        return
    gradients = [p.main_grad if hasattr(p, "main_grad") else p.grad for p in parameters]
    num_sets = topology.layout.tp // parameters[0].num_tp_replicas
    mine = topology.tp_rank // parameters[0].num_tp_replicas
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    sets = flat.new_zeros(num_sets, flat.shape[0])
    sets[mine] = flat
    dist.all_reduce(sets, group=topology.tp_group)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, total in zip(gradients, sets[mine].split(sizes), strict=True):
        gradient.copy_(total.view_as(gradient))
