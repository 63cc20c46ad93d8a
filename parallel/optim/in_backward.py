"""Optimizer in backward: weights are updated as soon as their gradients are complete, and these are freed."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.hooks import RemovableHandle

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.gradient_buckets import Bucket, buckets_of
from glm_rlhf.parallel.optim.state_shard import StateShard
from glm_rlhf.parallel.optim.training_state import (
    AdamSettings,
    StepResult,
    TrainingState,
    check_trainable,
    take_step,
)
from glm_rlhf.parallel.runtime.topology import Topology


class InBackwardState:
    """Owns the optimizer of one sharded model whose weights change during backward.

    There is no gradient buffer. Weights form buckets: one per transformer layer, the embedding, the final
    norm, the head. In the backward pass of a step's last micro-batch, a bucket with all its gradients is
    reduced (over tp where ranks hold partial or replicated gradients, then scattered over dp × cp), updated
    by AdamW on this rank's shard, gathered, and its gradients are freed. Backward visits one layer after
    another, so that at most one bucket's gradients exist at a time.

    Exceptions to this limit:

    - *Accumulation.* With several micro-batches per step, as pipeline parallelism needs, the sums of earlier
      gradients are kept until the last micro-batch: up to one whole gradient, in fp32, as with
      `TrainingState`. It shrinks bucket by bucket during the last backward; between steps there is none.
    - *A tied head.* Its gradient is kept until the embedding's, through the whole backward; if they are on
      different pipeline stages, until the end of the schedule.

    Clipping. The norm of the whole gradient is not known before backward ends. Each bucket is clipped by
    `clip_grad` / the newest known norm: of this step for the earlier buckets and for itself, of the previous
    step (0 in the first) for later buckets and other pipeline stages. Without pipeline stages the last bucket
    is clipped by the true norm; all buckets are if norms do not change between steps. Stages with a tied head
    exchange their norms when they update it. With `clip_grad` 0 the weights equal those of `TrainingState`.

    Non-finite gradients. The bucket and all later ones stay unchanged, on every rank that holds parts of
    their layers; earlier buckets have already changed. A non-finite loss has a gradient of NaN everywhere
    (`schedule`), so that no weight changes.
    """

    def __init__(self, chunks: Sequence[GLMModel], settings: AdamSettings, *, topology: Topology) -> None:
        """Hook into the gradients of `chunks`; every rank of the topology calls this.

        Args:
            chunks: this rank's model chunks, weights initialised. Their storage must not move.
            settings: of the optimizer.
            topology: gradients are summed over dp × cp, the optimizer state is sharded over it.

        Raises:
            ValueError: the weights are float16, whose gradients would need loss scaling.
        """
        check_trainable(chunks)
        self.topology, self.settings = topology, settings
        self.chunks = list(chunks)
        self._lr = settings.lr
        self.wait_for_readers: Callable[[], None] | None = None
        """Called before weights and moments change: returns when no save reads them any more."""
        self.num_steps = 0
        """Optimizer steps taken."""
        self._buckets = list(buckets_of(chunks, topology))
        self._is_last_micro_batch = True
        # Squared gradient norms per bucket: the newest, those of the last applied step, their total.
        self._squares_K = torch.zeros(len(self._buckets), dtype=torch.float64, device=topology.device)
        self._applied_squares_K = self._squares_K.clone()
        self._applied_total = self._newest_total = self._squares_K.new_zeros(())
        self._hook()

    @property
    def bare_chunks(self) -> list[GLMModel]:
        """This rank's chunks."""
        return self.chunks

    def zero_grad(self) -> None:
        """Drop gradients of a step that was not finished; before the first micro-batch of a step."""
        for bucket in self._buckets:
            bucket.reset()
        self._squares_K.copy_(self._applied_squares_K)
        self._is_last_micro_batch = True

    def set_lr(self, lr: float) -> None:
        """Use learning rate `lr` from the next step on."""
        self._lr = lr

    def step(self) -> StepResult:
        """Return the result of the backward pass; every rank calls this together, after the schedule.

        `is_applied` is false if some gradient was not finite; the class says which weights changed then.
        """
        return take_step(self)

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, after the schedule; every rank calls this together.

        The pipeline group all-reduces 8 bytes.
        """
        self._newest_total = self._sum_over_stages(self._squares_K.sum())
        return math.sqrt(self._newest_total.item())

    def apply(self, _grad_norm: float) -> None:
        """Count the step, whose norms the next one clips by; the weights have already changed."""
        self._applied_squares_K.copy_(self._squares_K)
        self._applied_total = self._newest_total
        self.num_steps += 1

    def nonfinite_gradients(self) -> list[str]:
        """Return nothing: gradients are freed before the step ends."""
        return []

    def gather_weights(self) -> None:
        """Do nothing: each bucket's weights are gathered after its update."""

    def parts(self) -> dict[str, StateShard]:
        """Return this rank's shards of the trained weights, by their names in the whole model."""
        return {part.name: part for bucket in self._buckets for part in bucket.parts()}

    @property
    def gradient_squares(self) -> dict[str, float]:
        """Squared norm of each bucket of this pipeline stage in the last step, which the next clips by."""
        names = (bucket.name for bucket in self._buckets)
        return dict(zip(names, self._applied_squares_K.tolist(), strict=True))

    def resume_from(self, num_steps: int, gradient_squares: Mapping[str, float]) -> None:
        """Continue from restored `parts`: gather their weights; every rank calls this.

        Args:
            num_steps: optimizer steps taken before.
            gradient_squares: of all stages' buckets; missing buckets count 0, as in a first step.
        """
        self.num_steps = num_steps
        squares = [gradient_squares.get(bucket.name, 0.0) for bucket in self._buckets]
        self._applied_squares_K.copy_(torch.tensor(squares, dtype=torch.float64))
        self._applied_total = self._sum_over_stages(self._applied_squares_K.sum())
        for bucket in self._buckets:
            bucket.gather()
        self.zero_grad()

    def _sum_over_stages(self, local: torch.Tensor) -> torch.Tensor:
        total = local.clone()
        dist.all_reduce(total, group=self.topology.pp_group)
        return total

    def _hook(self) -> None:
        """Register hooks on the gradients, and on the schedule for the end of a step."""
        # Why hooks: autograd calls one as soon as a gradient is complete, while layers before it still
        # run backward. Updating there, and not after backward, is what frees each bucket's gradients early.
        # All ranks run backward in the same order of layers, so the collectives of `_update` meet in the same
        # order everywhere, without extra synchronisation. A bucket that waits for another stage (a tied head)
        # would break that order and deadlock: it is left to `_finish`, where all stages call together.
        state = weakref.ref(self)  # a model outlives its training
        handles = []
        for index, bucket in enumerate(self._buckets):
            for position, parameter in enumerate(bucket.parameters):

                def on_gradient(_: torch.Tensor, index: int = index, position: int = position) -> None:
                    state()._on_gradient(index, position)

                handles.append(parameter.register_post_accumulate_grad_hook(on_gradient))
        megatron = self.chunks[0].config
        functions = (lambda: _Accumulation(state())), (lambda *_, **__: state()._finish())
        megatron.no_sync_func, megatron.finalize_model_grads_func = functions
        weakref.finalize(self, _unhook, handles, megatron, *functions)

    def _on_gradient(self, index: int, position: int) -> None:
        """Take one weight's gradient of one micro-batch; update its bucket if that was the last gradient."""
        bucket = self._buckets[index]
        bucket.take(position)
        if self._is_last_micro_batch:
            bucket.missing.discard(position)
            if not bucket.missing and not bucket.waits_for_other_stage:
                self._update(index)

    def _finish(self) -> None:
        """Update the remaining buckets: a head tied over stages, and weights without a gradient."""
        for index, bucket in enumerate(self._buckets):
            if not bucket.is_updated:
                self._update(index)

    @torch.no_grad()
    def _update(self, index: int) -> None:
        """Reduce, update, gather and free one bucket; its tp and dp × cp groups call together."""
        bucket = self._buckets[index]
        gradients = bucket.reduced_gradients()
        square = bucket.counted_square(gradients)
        dist.all_reduce(square, group=self.topology.dp_cp_group)
        dist.all_reduce(square, group=self.topology.tp_group)
        self._squares_K[index] = square
        if self.wait_for_readers is not None:
            self.wait_for_readers()
        bucket.update(
            gradients,
            step=self.num_steps + 1,
            lr=self._lr,
            clip_factor=self._clip_factor(bucket),
            settings=self.settings,
        )

    def _clip_factor(self, bucket: Bucket) -> torch.Tensor:
        """Return the factor of a bucket's gradient, fp32 []; NaN if a norm is not finite.

        Both stages of a tied head sum their norms and use the same factor, so that the copies stay equal.
        """
        newest, applied = self._squares_K.sum(), self._applied_squares_K.sum()
        if bucket.waits_for_other_stage:
            both = torch.stack([newest, applied])
            dist.all_reduce(both, group=parallel_state.get_embedding_group())
            newest, applied = both
        norm = (newest + (self._applied_total - applied).clamp(min=0.0)).sqrt()
        limit = self.settings.clip_grad
        factor = (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)
        return torch.where(norm.isfinite(), factor, torch.nan).float()


AnyTrainingState = TrainingState | InBackwardState
"""Both have the same interface."""


class _Accumulation:
    """A context, entered by `multi_model.backward_of`, in which gradients are only accumulated."""

    def __init__(self, state: InBackwardState) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._state._is_last_micro_batch = False

    def __exit__(self, *exception: object) -> None:
        self._state._is_last_micro_batch = True


def _unhook(
    handles: Sequence[RemovableHandle],
    megatron: TransformerConfig,
    accumulate: Callable[..., object],
    finish: Callable[..., object],
) -> None:
    """Remove the hooks from the model, except those of a later training state."""
    for handle in handles:
        handle.remove()
    if megatron.no_sync_func is accumulate:
        megatron.no_sync_func = None
    if megatron.finalize_model_grads_func is finish:
        megatron.finalize_model_grads_func = None


def training_state(
    chunks: Sequence[GLMModel],
    settings: AdamSettings,
    *,
    topology: Topology,
    overlap_communication: bool = False,
    in_backward: bool = False,
) -> AnyTrainingState:
    """Return the training state for the options; every rank calls this. See the classes.

    Raises:
        ValueError: the weights are float16, or both options are on.
    """
    if not in_backward:
        return TrainingState(chunks, settings, topology=topology, overlap_communication=overlap_communication)
    if overlap_communication:
        raise ValueError(
            "an optimizer in backward communicates during backward: set overlap_communication to false"
        )
    return InBackwardState(chunks, settings, topology=topology)
