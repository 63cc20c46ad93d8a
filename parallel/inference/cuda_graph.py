"""Decode steps recorded once and replayed: one CUDA graph per chunk and batch size, in one memory pool.

A step of a few milliseconds has a thousand kernels, and the host takes longer to launch them than the device
to run them. A graph reads its inputs, the cache and the parameters by address: one copy fills the inputs of a
step, and a replay after an optimizer step uses the new weights.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from glm_rlhf.parallel.inference.step_inputs import (
    DecodeBatch,
    PinnedInputs,
    decode_batch,
    decode_shapes,
    fill_decodes,
)
from glm_rlhf.parallel.inference.step_plan import SequenceWork, StepPlan

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Batch sizes that are recorded; a step is padded to the next one, a larger one runs eagerly."""
_NUM_WARM_UPS = 2

Compute = Callable[[int, DecodeBatch, torch.Tensor | None], torch.Tensor]
"""(chunk, rows, the previous chunk's output) → this chunk's output, one row per sequence."""


class Recording(Protocol):
    """A recorded function."""

    output: torch.Tensor
    """The function's result; each replay overwrites it."""

    def replay(self) -> None:
        """Run the function again, on the current contents of its inputs."""


Record = Callable[[Callable[[], torch.Tensor], Any], Recording]
"""(function, memory pool that all recordings of a phase share) → its recording."""


class DecodeGraphs:
    """Owns the recordings of one generation phase and the memory of their inputs.

    All tensor-parallel ranks of a stage hold the same rows, so that they record and replay the same
    collectives in the same order.
    """

    # Why the restrictions: a graph fixes addresses, shapes and launches. So every step copies its inputs into
    # the same buffers, batches are padded to a recorded size, and page tables have a fixed width; prefill,
    # whose shapes vary, stays eager. Padding rows have length 0 and slot −1, so that padded replays, and the
    # recording itself, leave the cache unchanged. Outputs are cloned, because the graphs share a memory pool
    # and a later replay overwrites them.

    def __init__(
        self,
        compute: Compute,
        *,
        page_size: int,
        table_width: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        record: Record,
    ) -> None:
        """Record nothing yet: each batch size is recorded at its first use.

        Args:
            compute: the step.
            page_size: positions per page.
            table_width: most pages per sequence; a step with a longer sequence runs eagerly.
            hidden_size: width of the residual stream.
            dtype: of the residual stream.
            device: of the model.
            record: `record_cuda_graph`, or a replacement in tests.
        """
        self._compute, self._record = compute, record
        self._page_size, self._table_width = page_size, table_width
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._steps: dict[tuple[int, int], _RecordedStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def num_recordings(self) -> int:
        """Number of recordings."""
        return len(self._steps)

    def can_replay(self, plan: StepPlan) -> bool:
        """Return whether a step can be replayed: only decodes, not too many, and not too long."""
        return (
            not plan.prefills
            and len(plan.decodes) <= BATCH_SIZES[-1]
            and all(len(work.pages) <= self._table_width for work in plan.decodes)
        )

    def inputs(self, works: Sequence[SequenceWork]) -> PinnedInputs:
        """Return a step's inputs, padded to the next recorded batch size."""
        num_rows = BATCH_SIZES[bisect_left(BATCH_SIZES, len(works))]
        inputs = PinnedInputs(decode_shapes(num_rows, self._table_width))
        fill_decodes(inputs.arrays, works, self._page_size)
        return inputs

    def run(
        self, chunk: int, inputs: PinnedInputs, num_rows: int, hidden_BD: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the chunk's output for the first `num_rows` rows, a new tensor.

        Args:
            chunk: index among this rank's chunks.
            inputs: result of `DecodeGraphs.inputs`.
            num_rows: rows without padding.
            hidden_BD: the previous chunk's output [num_rows, D]; None for the model's first chunk.
        """
        key = (chunk, len(inputs.arrays[0]))
        if key not in self._steps:
            self._steps[key] = self._recorded(chunk, inputs, has_hidden=hidden_BD is not None)
        step = self._steps[key]
        step.words.copy_(inputs.words, non_blocking=True)
        if hidden_BD is not None:
            step.hidden_BD[:num_rows] = hidden_BD
        step.recording.replay()
        return step.recording.output[:num_rows].clone()

    def clear(self) -> None:
        """Drop all recordings and their memory."""
        self._steps.clear()

    def _recorded(self, chunk: int, like: PinnedInputs, *, has_hidden: bool) -> "_RecordedStep":
        """Return the recording of a step of padding rows, which leave the cache unchanged."""
        num_rows = len(like.arrays[0])
        empty = PinnedInputs(decode_shapes(num_rows, self._table_width))
        fill_decodes(empty.arrays, (), self._page_size)
        words = empty.words.to(self._device)
        batch = decode_batch(empty.views(words))
        hidden_BD = None
        if has_hidden:
            hidden_BD = torch.zeros(num_rows, self._hidden_size, dtype=self._dtype, device=self._device)
        recording = self._record(lambda: self._compute(chunk, batch, hidden_BD), self._pool)
        return _RecordedStep(words=words, hidden_BD=hidden_BD, recording=recording)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordedStep:
    """A recording and the memory of its inputs."""

    words: torch.Tensor
    hidden_BD: torch.Tensor | None
    recording: Recording


def record_cuda_graph(function: Callable[[], torch.Tensor], pool: Any) -> Recording:
    """Return a CUDA graph of a function that never waits for the device; it allocates from `pool`.

    The function first runs on a side stream: kernels are compiled, and libraries and NCCL initialise, which
    cannot be recorded.
    """
    return _CudaGraph(function, pool)


class _CudaGraph:
    """Owns one graph."""

    def __init__(self, function: Callable[[], torch.Tensor], pool: Any) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_NUM_WARM_UPS):
                function()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are checked: NCCL's watchdog thread queries events during the capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function()

    def replay(self) -> None:
        self._graph.replay()
