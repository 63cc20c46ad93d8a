"""Buckets of weights that are updated together, with this rank's shard of their optimizer state."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from glm_rlhf.kernels import AdamWTable, adamw
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.state_shard import SplitMaster, StateShard
from glm_rlhf.parallel.optim.training_state import AdamSettings, sum_replicas
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.checkpoint_manifest import ADAM_MOMENTS


def buckets_of(chunks: Sequence[GLMModel], topology: Topology) -> Iterator["Bucket"]:
    """Yield buckets of the trained weights: one per layer, the embedding, the final norm, the head."""
    for chunk in chunks:
        members: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
        for name, parameter in chunk.named_weights():
            parts = name.split(".")
            key = ".".join(parts[:3]) if name.startswith("decoder.layers.") else parts[0]
            if parameter.requires_grad:
                members.setdefault(key, []).append((name, parameter))
        yield from (Bucket(key, weights, topology) for key, weights in members.items())


class Bucket:
    """Weights that are updated together, their current gradients, and this rank's optimizer state."""

    def __init__(
        self, name: str, members: Sequence[tuple[str, torch.nn.Parameter]], topology: Topology
    ) -> None:
        self.name = name
        """Common prefix of its weights' names in the whole model."""
        self._names = [member for member, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.waits_for_other_stage = any(hasattr(p, "shared_embedding") for p in self.parameters)
        self._topology = topology
        self._gradients: list[torch.Tensor | None] = [None] * len(members)
        self._shards = [_Shard(parameter, topology.dp_cp_group) for parameter in self.parameters]
        self._is_counted = [_is_counted(parameter, topology) for parameter in self.parameters]
        decays = [p.dim() > 1 and not name.endswith(".bias") for name, p in members]
        kinds = sorted({(str(p.dtype), decay) for p, decay in zip(self.parameters, decays, strict=True)})
        groups = [
            [i for i, p in enumerate(self.parameters) if (str(p.dtype), decays[i]) == kind] for kind in kinds
        ]
        self._tables = [
            (_table([self._shards[i] for i in group]), group, decays[group[0]]) for group in groups
        ]
        self.reset()

    def reset(self) -> None:
        """Drop all gradients, for a new step."""
        self._gradients = [None] * len(self.parameters)
        self.missing = set(range(len(self.parameters)))
        self.is_updated = False

    def take(self, index: int) -> None:
        """Move the `grad` of a parameter into the bucket, added in fp32 to earlier gradients."""
        parameter, earlier = self.parameters[index], self._gradients[index]
        if earlier is None:
            self._gradients[index] = parameter.grad
        else:
            self._gradients[index] = earlier.float().add_(parameter.grad)
        parameter.grad = None

    def reduced_gradients(self) -> list[torch.Tensor]:
        """Return this rank's shards of the gradients, summed over all ranks that contribute."""
        topology = self._topology
        dtype = torch.float32 if topology.world_size > 1 else None
        gradients = [self._release(index, dtype) for index in range(len(self.parameters))]
        if self.waits_for_other_stage:
            dist.all_reduce(gradients[0], group=parallel_state.get_embedding_group())
        pairs = list(zip(self.parameters, gradients, strict=True))
        partial = [g for p, g in pairs if getattr(p, "sequence_parallel", False)]
        if partial:
            flat = torch.cat([gradient.flatten() for gradient in partial])
            dist.all_reduce(flat, group=topology.tp_group)
            for gradient, total in zip(partial, flat.split([g.numel() for g in partial]), strict=True):
                gradient.copy_(total.view_as(gradient))
        replicated = [(p, g) for p, g in pairs if hasattr(p, "num_tp_replicas")]
        sum_replicas([p for p, _ in replicated], [g for _, g in replicated], topology)
        reductions = [shard.start_reduction(g) for shard, g in zip(self._shards, gradients, strict=True)]
        return [_finished(piece, work) for piece, work in reductions]

    def _release(self, index: int, dtype: torch.dtype | None) -> torch.Tensor:
        """Return a weight's whole gradient, zeros if it has none, and drop the bucket's reference to it."""
        gradient, self._gradients[index] = self._gradients[index], None
        if gradient is None:
            return torch.zeros_like(self.parameters[index], dtype=dtype)
        return gradient.to(dtype or gradient.dtype).contiguous()

    def counted_square(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return this rank's contribution, fp64 [], to the squared norm of the whole model's gradient."""
        total = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        for gradient, is_counted in zip(gradients, self._is_counted, strict=True):
            if is_counted:
                total += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
        return total

    def update(
        self,
        gradients: list[torch.Tensor],
        *,
        step: int,
        lr: float,
        clip_factor: torch.Tensor,
        settings: AdamSettings,
    ) -> None:
        """Take one AdamW step with this rank's shards of the gradients, and gather the weights."""
        for table, indices, decays in self._tables:
            table_gradients = [gradients[index] for index in indices]
            if len({gradient.dtype for gradient in table_gradients}) > 1:  # some sum several micro-batches
                table_gradients = [gradient.float() for gradient in table_gradients]
            adamw(
                table,
                table_gradients,
                step=step,
                lr=lr,
                betas=settings.betas,
                epsilon=settings.epsilon,
                weight_decay=settings.weight_decay if decays else 0.0,
                clip_factor=clip_factor,
            )
        self.gather()
        self.is_updated = True

    def gather(self) -> None:
        """All-gather every rank's shard of the weights."""
        started = [shard.start_gather() for shard in self._shards]
        for shard, (whole, work) in zip(self._shards, started, strict=True):
            shard.finish_gather(_finished(whole, work))

    def parts(self) -> Iterator[StateShard]:
        """Yield this rank's shards, without padding; a rank may have no part of a small weight."""
        for table, indices, _ in self._tables:
            for row, index in enumerate(indices):
                start, count = self._shards[index].span
                if count:
                    weight = table.weights[row][:count]
                    moments = table.first_moments[row][:count], table.second_moments[row][:count]
                    yield StateShard(
                        name=self._names[index],
                        start=start,
                        weight=weight
                        if table.remainders is None
                        else SplitMaster(weight=weight, remainder=table.remainders[row][:count]),
                        is_trained=True,
                        moments=dict(zip(ADAM_MOMENTS, moments, strict=True)),
                    )


class _Shard:
    """This rank's shard of one weight: equal numbers of elements on all dp × cp ranks."""

    def __init__(self, parameter: torch.nn.Parameter, group: dist.ProcessGroup) -> None:
        self._parameter, self._group = parameter, group
        self._size = -(-parameter.numel() // group.size())
        self._num_padding = self._size * group.size() - parameter.numel()
        whole = self._padded(parameter.detach())
        self.weight_S = self._local(whole) if not self._num_padding else self._local(whole).clone()
        """A view of the weight, or a padded copy if its elements do not divide evenly."""

    @property
    def span(self) -> tuple[int, int]:
        """(first element, number of elements without padding) in the flattened weight."""
        start = self._group.rank() * self._size
        return start, max(0, min(self._size, self._parameter.numel() - start))

    def start_reduction(self, gradient: torch.Tensor) -> tuple[torch.Tensor, dist.Work | None]:
        """Return (this rank's part of the sum of all ranks' gradients, the work to wait for)."""
        whole = self._padded(gradient)
        piece_S = self._local(whole)
        if self._group.size() == 1:
            return piece_S, None
        return piece_S, dist.reduce_scatter_tensor(piece_S, whole, group=self._group, async_op=True)

    def start_gather(self) -> tuple[torch.Tensor, dist.Work | None]:
        """Return (the whole padded weight, valid after the wait; the work to wait for)."""
        whole = self._padded(self._parameter.detach())
        if self._group.size() == 1:
            return whole, None
        return whole, dist.all_gather_into_tensor(whole, self.weight_S, group=self._group, async_op=True)

    def finish_gather(self, whole: torch.Tensor) -> None:
        """Copy the gathered weight to the parameter, unless it was gathered in place."""
        if self._num_padding:
            self._parameter.detach().view(-1).copy_(whole[: -self._num_padding])

    def _padded(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.view(-1)
        return torch.nn.functional.pad(flat, (0, self._num_padding)) if self._num_padding else flat

    def _local(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.view(self._group.size(), -1)[self._group.rank()]


def _table(shards: Sequence[_Shard]) -> AdamWTable:
    """Return the optimizer state of shards of one dtype, with moments of zero."""
    weights = [shard.weight_S for shard in shards]
    return AdamWTable(
        weights=weights,
        first_moments=[torch.zeros_like(weight, dtype=torch.float32) for weight in weights],
        second_moments=[torch.zeros_like(weight, dtype=torch.float32) for weight in weights],
        remainders=None
        if weights[0].dtype is torch.float32
        else [torch.zeros_like(weight, dtype=torch.int16) for weight in weights],
    )


def _is_counted(parameter: torch.nn.Parameter, topology: Topology) -> bool:
    """Return whether gradient norms count a weight on this rank: of several copies, the first."""
    is_first = getattr(parameter, "tensor_model_parallel", False) or topology.tp_rank == 0
    return is_first and not getattr(parameter, "shared", False)


def _finished(tensor: torch.Tensor, work: dist.Work | None) -> torch.Tensor:
    if work is not None:
        work.wait()
    return tensor
