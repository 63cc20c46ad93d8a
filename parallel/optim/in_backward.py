"""Optimizer in backward: weights change as soon as their gradient is complete, and it is freed."""

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

    There is no gradient buffer. Weights form buckets: a transformer layer each, the embedding, the final
    norm, the head. In the backward pass of a step's last micro-batch a bucket whose gradients have all
    arrived is reduced (over tp where ranks hold parts or copies of a gradient, then scattered over
    dp × cp), updated by AdamW on this rank's share, gathered, and its gradients are freed. Layers come one
    after the other, so that at most one bucket's gradient exists at a time.

    What that promise excludes:

    - *Accumulation.* With several micro-batches a step, which pipeline stages need to be busy, the sums of
      the earlier ones wait for the last: up to one whole gradient, in fp32, as with `TrainingState`. During
      the last backward it shrinks bucket by bucket, and between steps there is none.
    - *A tied head.* Its gradient waits for the embedding's, through the whole backward; where they are on
      different pipeline stages, until the schedule's end.

    Clipping. The norm of the whole gradient is not known before backward ends. Each bucket is clipped by
    `clip_grad` / the newest norm there is: of this step for the buckets that came before it and for itself,
    of the step before for those to come and for other pipeline stages, 0 in the first step. Its last bucket
    without pipeline stages is clipped by the true norm; all are when norms do not change. Stages that share
    a tied head know each other's norms when they update it. With `clip_grad` 0 the weights are those of
    `TrainingState`.

    A gradient that is not finite. Its bucket and all after it stay as they are, on every rank that shares
    their layers; buckets before it have changed already. A loss that is not finite has a gradient of NaN
    everywhere (`schedule`), so that nothing changes.
    """

    def __init__(self, chunks: Sequence[GLMModel], settings: AdamSettings, *, topology: Topology) -> None:
        """Hook into the gradients of `chunks`; every rank of the topology calls this.

        Args:
            chunks: this rank's model chunks, weights filled. Their storage has to stay where it is.
            settings: of the optimizer.
            topology: gradients are summed over dp × cp, the optimizer's state is split over it.

        Raises:
            ValueError: the weights are float16, whose gradients would need a loss scale.
        """
        check_trainable(chunks)
        self.topology, self.settings = topology, settings
        self.chunks = list(chunks)
        self._lr = settings.lr
        self.wait_for_readers: Callable[[], None] | None = None
        """Called before weights and moments change: returns when nobody reads them any more."""
        self.num_steps = 0
        """Steps that were taken."""
        self._buckets = list(buckets_of(chunks, topology))
        self._is_last_micro_batch = True
        # Squared norms of buckets: the newest, those of the last step that was taken, their sum over stages.
        self._squares_K = torch.zeros(len(self._buckets), dtype=torch.float64, device=topology.device)
        self._taken_squares_K = self._squares_K.clone()
        self._taken_total = self._newest_total = self._squares_K.new_zeros(())
        self._hook()

    @property
    def bare_chunks(self) -> list[GLMModel]:
        """This rank's chunks."""
        return self.chunks

    def zero_grad(self) -> None:
        """Forget gradients of a step that was given up; before the first micro-batch of a step."""
        for bucket in self._buckets:
            bucket.forget()
        self._squares_K.copy_(self._taken_squares_K)
        self._is_last_micro_batch = True

    def set_lr(self, lr: float) -> None:
        """Use learning rate `lr` from the next step on."""
        self._lr = lr

    def step(self) -> StepResult:
        """Return what the backward pass did; every rank calls this together, after the schedule.

        `is_applied` is false when some gradient was not finite; see the class for what then has changed.
        """
        return take_step(self)

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, after the schedule; every rank calls this together.

        The pipeline's stages add up theirs, 8 bytes.
        """
        self._newest_total = self._sum_over_stages(self._squares_K.sum())
        return math.sqrt(self._newest_total.item())

    def apply(self, _grad_norm: float) -> None:
        """Count the step, whose norms the next one clips by: the weights have changed already."""
        self._taken_squares_K.copy_(self._squares_K)
        self._taken_total = self._newest_total
        self.num_steps += 1

    def nonfinite_gradients(self) -> list[str]:
        """Return nothing: gradients are gone when the step ends."""
        return []

    def gather_weights(self) -> None:
        """Do nothing: weights are gathered as they change."""

    def parts(self) -> dict[str, StateShard]:
        """Return this rank's shares of the weights that are trained, by their names in the whole model."""
        return {part.name: part for bucket in self._buckets for part in bucket.parts()}

    @property
    def gradient_squares(self) -> dict[str, float]:
        """Squared norm of each bucket of this pipeline stage in the last step, which the next clips by."""
        names = (bucket.name for bucket in self._buckets)
        return dict(zip(names, self._taken_squares_K.tolist(), strict=True))

    def resume_from(self, num_steps: int, gradient_squares: Mapping[str, float]) -> None:
        """Gather the weights of `parts` that were filled, and continue; every rank calls this.

        Args:
            num_steps: steps behind them.
            gradient_squares: of all stages' buckets; those that are not in it count 0, as in a first step.
        """
        self.num_steps = num_steps
        squares = [gradient_squares.get(bucket.name, 0.0) for bucket in self._buckets]
        self._taken_squares_K.copy_(torch.tensor(squares, dtype=torch.float64))
        self._taken_total = self._sum_over_stages(self._taken_squares_K.sum())
        for bucket in self._buckets:
            bucket.gather()
        self.zero_grad()

    def _sum_over_stages(self, own: torch.Tensor) -> torch.Tensor:
        total = own.clone()
        dist.all_reduce(total, group=self.topology.pp_group)
        return total

    def _hook(self) -> None:
        """Have gradients brought to their buckets, and Megatron-core's schedules tell when a step ends."""
        me = weakref.ref(self)  # a model outlives its training
        handles = []
        for index, bucket in enumerate(self._buckets):
            for place, parameter in enumerate(bucket.parameters):

                def arrive(_: torch.Tensor, index: int = index, place: int = place) -> None:
                    me()._arrive(index, place)

                handles.append(parameter.register_post_accumulate_grad_hook(arrive))
        megatron = self.chunks[0].config
        functions = (lambda: _Accumulation(me())), (lambda *_, **__: me()._finish())
        megatron.no_sync_func, megatron.finalize_model_grads_func = functions
        weakref.finalize(self, _unhook, handles, megatron, *functions)

    def _arrive(self, index: int, place: int) -> None:
        """Take one weight's gradient of one micro-batch; update its bucket when nothing more can come."""
        bucket = self._buckets[index]
        bucket.take(place)
        if self._is_last_micro_batch:
            bucket.missing.discard(place)
            if not bucket.missing and not bucket.waits_for_other_stage:
                self._update(index)

    def _finish(self) -> None:
        """Update what the last backward left: a head tied over stages, and weights that the loss skipped."""
        for index, bucket in enumerate(self._buckets):
            if not bucket.is_updated:
                self._update(index)

    @torch.no_grad()
    def _update(self, index: int) -> None:
        """Reduce, update, gather and free one bucket; ranks of its tp and dp × cp groups call together."""
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
        """Return what a bucket's gradient is multiplied by, fp32 []; NaN where a norm is not finite.

        Both stages of a tied head take the same, that the copies stay copies: they know each other's norms.
        """
        newest, taken = self._squares_K.sum(), self._taken_squares_K.sum()
        if bucket.waits_for_other_stage:
            both = torch.stack([newest, taken])
            dist.all_reduce(both, group=parallel_state.get_embedding_group())
            newest, taken = both
        norm = (newest + (self._taken_total - taken).clamp(min=0.0)).sqrt()
        limit = self.settings.clip_grad
        factor = (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)
        return torch.where(norm.isfinite(), factor, torch.nan).float()


AnyTrainingState = TrainingState | InBackwardState
"""What a stage trains with; both are used alike."""


class _Accumulation:
    """A context, as Megatron-core's schedules enter it, in which gradients are added up and nothing else."""

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
    """Leave the model as it was, but for what a later state has put there."""
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
    """Return the training state that is asked for; every rank calls this. See the classes.

    Raises:
        ValueError: the weights are float16, or both options are on.
    """
    if not in_backward:
        return TrainingState(chunks, settings, topology=topology, overlap_communication=overlap_communication)
    if overlap_communication:
        raise ValueError(
            "an optimizer in backward communicates during backward: overlap_communication has to be off"
        )
    return InBackwardState(chunks, settings, topology=topology)
