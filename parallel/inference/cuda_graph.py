"""Pure decode steps recorded once and replayed: one CUDA graph a chunk and batch size, in one memory pool.

A step of a few milliseconds has a thousand kernels, and the host would need longer to launch them than the
device to run them. A recording reads its inputs, the cache and the parameters by address: a step fills the
inputs with one copy, and an optimizer step between two replays is seen by the second.
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
"""Numbers of rows that are recorded; a step is filled up to the next one, a larger one runs eagerly."""
_NUM_WARM_UPS = 2

Compute = Callable[[int, DecodeBatch, torch.Tensor | None], torch.Tensor]
"""(chunk, rows, the former chunk's output) → this chunk's output, one row a sequence."""


class Recording(Protocol):
    """SequenceWork that was recorded."""

    output: torch.Tensor
    """What the work returned; each replay writes it anew."""

    def replay(self) -> None:
        """Do the work again, on what its inputs hold now."""


Record = Callable[[Callable[[], torch.Tensor], Any], Recording]
"""(work, memory pool that all recordings of a phase share) → its recording."""


class DecodeGraphs:
    """Owns the recordings of one phase and the memory of their inputs.

    All tensor-parallel ranks of a stage hold the same rows, so that they record and replay the same
    collectives in the same order.
    """

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
        """Record nothing yet: each batch size is recorded when it first comes.

        Args:
            compute: the step.
            page_size: positions a page.
            table_width: the most pages of a sequence; with more it runs eagerly.
            hidden_size: width of the residual stream.
            dtype: of the residual stream.
            device: of the model.
            record: `record_cuda_graph`, or what stands in for it.
        """
        self._compute, self._record = compute, record
        self._page_size, self._table_width = page_size, table_width
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._steps: dict[tuple[int, int], _RecordedStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def num_recordings(self) -> int:
        """Recordings that were made and not dropped."""
        return len(self._steps)

    def takes(self, plan: StepPlan) -> bool:
        """Return whether a step can be replayed: sequences that decode, not too many, and not too long."""
        return (
            not plan.prefills
            and len(plan.decodes) <= BATCH_SIZES[-1]
            and all(len(work.pages) <= self._table_width for work in plan.decodes)
        )

    def numbers(self, works: Sequence[SequenceWork]) -> PinnedInputs:
        """Return a step's numbers, filled up to the next recorded batch size."""
        num_rows = BATCH_SIZES[bisect_left(BATCH_SIZES, len(works))]
        numbers = PinnedInputs(decode_shapes(num_rows, self._table_width))
        fill_decodes(numbers.arrays, works, self._page_size)
        return numbers

    def run(
        self, chunk: int, numbers: PinnedInputs, num_rows: int, hidden_BD: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the chunk's output for the first `num_rows` rows, in memory of its own.

        Args:
            chunk: which of this rank's chunks.
            numbers: of this class's `numbers`.
            num_rows: sequences.
            hidden_BD: the former chunk's output [num_rows, D]; None for the model's first chunk.
        """
        key = (chunk, len(numbers.arrays[0]))
        if key not in self._steps:
            self._steps[key] = self._recorded(chunk, numbers, has_hidden=hidden_BD is not None)
        step = self._steps[key]
        step.words.copy_(numbers.words, non_blocking=True)
        if hidden_BD is not None:
            step.hidden_BD[:num_rows] = hidden_BD
        step.recording.replay()
        return step.recording.output[:num_rows].clone()

    def clear(self) -> None:
        """Drop all recordings and their memory."""
        self._steps.clear()

    def _recorded(self, chunk: int, like: PinnedInputs, *, has_hidden: bool) -> "_RecordedStep":
        """Record a step whose rows are all there to fill up: they leave the cache as it is."""
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
    """A recording and the memory that it reads its inputs from."""

    words: torch.Tensor
    hidden_BD: torch.Tensor | None
    recording: Recording


def record_cuda_graph(work: Callable[[], torch.Tensor], pool: Any) -> Recording:
    """Return a CUDA graph of the work; it waits for nothing on the host and allocates from `pool`.

    The work runs before on a stream of its own: kernels are compiled, and libraries and NCCL set up what
    they need, which cannot be recorded.
    """
    return _CudaGraph(work, pool)


class _CudaGraph:
    """Owns one graph."""

    def __init__(self, work: Callable[[], torch.Tensor], pool: Any) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_NUM_WARM_UPS):
                work()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are watched: NCCL's own thread asks for the state of older work meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = work()

    def replay(self) -> None:
        self._graph.replay()
