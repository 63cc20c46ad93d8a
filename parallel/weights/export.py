"""Export of a sharded model to a Hugging Face folder, directly from the ranks that hold it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.consensus import reason_of
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.folder_writer import Writers
from glm_rlhf.parallel.weights.hf_writer import export_tensors

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


def export_model(
    chunks: Sequence[GLMModel],
    target: str | Path,
    *,
    topology: Topology,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a folder in the form of the model's family; it appears atomically when it is complete.

    Every rank of the topology calls this and returns when the folder exists. One copy of the model writes:
    each stage its own layers, assembled on its first tensor-parallel rank, one parameter in memory at a time.

    Args:
        chunks: this rank's chunks, bare (not wrapped for training).
        target: the new folder; it must not exist, or be empty.
        topology: layout and groups.
        source: folder whose tokenizer and other files are copied.
        dtype: of the weights; None keeps the model's. A scalar head is fp32.
        max_shard_bytes: largest file, except for single larger tensors.

    Raises:
        ValueError: the target exists, or a stage could not write; on every rank.
    """
    error: Exception | None = None
    if topology.dp_cp_group.rank() == 0:
        error = _write(chunks, Path(target), topology, source, dtype, max_shard_bytes)
    messages: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(messages, None if error is None else reason_of(error))
    if error is not None:
        raise error
    message = next((text for text in messages if text is not None), None)
    if message is not None:
        raise ValueError(f"writing {target} failed: {message}")


def _write(
    chunks: Sequence[GLMModel],
    target: Path,
    topology: Topology,
    source: str | Path | None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> Exception | None:
    """Write this stage's part; takes part in every collective of its groups, also after a failure."""
    gathered = _gathered(chunks, topology)
    error: Exception | None = None
    if topology.tp_rank == 0:
        barrier = _StageBarrier(topology)
        try:
            export_tensors(
                target,
                chunks[0].glm,
                gathered,
                tp_size=topology.layout.tp,
                dtype=chunks[0].config.params_dtype if dtype is None else dtype,
                role="policy" if chunks[0].role == "reference" else chunks[0].role,
                max_shard_bytes=max_shard_bytes,
                source=source,
                writers=Writers(
                    rank=topology.pp_rank,
                    count=topology.layout.pp,
                    barrier=barrier,
                    writer_of_layer=_stage_of_layer(chunks[0]),
                ),
            )
        except (ValueError, OSError) as raised:
            error = raised
            barrier.fail()
    for _ in gathered:  # the other tensor-parallel ranks send their parts, also after a failure
        pass
    return error


class _StageBarrier:
    """A barrier of the writing stages, at which a failed stage makes the others raise."""

    def __init__(self, topology: Topology) -> None:
        self._group = topology.pp_group
        self._device = topology.device
        self._has_failed = False

    def __call__(self) -> None:
        self._exchange(has_failed=False)

    def fail(self) -> None:
        """Report to the others, once, that this stage failed."""
        if not self._has_failed:
            self._exchange(has_failed=True)

    def _exchange(self, *, has_failed: bool) -> None:
        num_failed = torch.tensor([int(has_failed)], device=self._device)
        dist.all_reduce(num_failed, group=self._group)
        if int(num_failed):
            self._has_failed = True
            if not has_failed:
                raise ValueError("another pipeline stage could not write its part")


def _gathered(chunks: Sequence[GLMModel], topology: Topology) -> Iterator[tuple[str, Sequence[torch.Tensor]]]:
    """Yield every parameter of this stage; on the first tensor-parallel rank with all its parts."""
    group, tp = topology.tp_group, topology.layout.tp
    first = dist.get_global_rank(group, 0)
    for chunk in chunks:
        for name, parameter in chunk.named_weights():
            part = parameter.detach()
            if tp == 1:
                yield name, [part]
                continue
            parts = [torch.empty_like(part) for _ in range(tp)] if topology.tp_rank == 0 else None
            dist.gather(part.contiguous(), parts, dst=first, group=group)
            yield name, parts or []


def _stage_of_layer(chunk: GLMModel) -> list[int]:
    layout = chunk.topology.layout
    layers_per_chunk = chunk.glm.num_layers // (layout.pp * layout.vpp)
    return [layer // layers_per_chunk % layout.pp for layer in range(chunk.glm.num_layers)]
