"""One phase of generation on the ranks and weights that train."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout.scheduling.request_queue import Completion, GenerationQueue, GenerationRequest
from glm_rlhf.parallel.inference.cuda_graph import Record, record_cuda_graph
from glm_rlhf.parallel.inference.kv_cache import KVCache, num_pages_within
from glm_rlhf.parallel.inference.pipelined_loop import TickCount, run_queue
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.inference.stage import GenerationStage
from glm_rlhf.parallel.inference.weight_views import ChunkWeights, chunk_weights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.pipeline.oom import has_failed_on_peers
from glm_rlhf.parallel.runtime.log import log_rank
from glm_rlhf.parallel.runtime.topology import Topology

_SHARE_OF_FREE_MEMORY = 0.8


class GenerationPhase:
    """Owns the memory of generation: the key/value cache and captured decode steps.

    A context manager that frees this memory at its end. The weights are used in place, and may be updated in
    place during the phase.
    """

    def __init__(
        self,
        chunks: Sequence[GLMModel | ChunkWeights],
        *,
        topology: Topology,
        batch: GenerationSection,
        longest: int,
        record: Record | None = None,
    ) -> None:
        """Compute the size of the cache.

        Args:
            chunks: this rank's chunks of the policy, or their weights in a generation layout.
            topology: layout and groups of the chunks.
            batch: how much at once: max_batch, max_step_tokens, page_size, cache_bytes.
            longest: positions of the longest sequence that may come, prompt and answer.
            record: how decode steps are recorded; None for CUDA graphs on CUDA, and not at all on a CPU.
        """
        self.topology, self.batch = topology, batch
        self.num_groups = topology.layout.pp
        self.ticks = TickCount()
        is_cuda = topology.device.type == "cuda"
        self._record = record_cuda_graph if record is None and is_cuda else record
        self._longest = longest
        self._chunks = chunk_weights(chunks)
        self.num_pages = self._plan_pages(longest)
        self._cache: KVCache | None = None
        self._stage: GenerationStage | None = None

    def __enter__(self) -> "GenerationPhase":
        self._cache = KVCache(self._chunks, num_pages=self.num_pages, page_size=self.batch.page_size)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._cache = self._stage = None

    def run(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingSettings,
        *,
        stop_check: Callable[[Sequence[int]], bool] | None = None,
        when_idle: Callable[[], None] | None = None,
    ) -> Iterator[Completion]:
        """Yield completions as they end, the same on all ranks of the pipeline and tensor-parallel groups.

        If a step runs out of memory, its sequences wait again and steps are half as large for the rest of the
        phase. With tensor parallelism this needs all ranks to run out at the same collective.

        Args:
            requests: prompts of this data-parallel rank.
            sampling: the sampling distribution.
            stop_check: returns whether an answer ends with its tokens so far, in addition to its stop ids.
            when_idle: called in idle slots of the pipeline, see `run_queue`.

        Raises:
            ValueError: a request that the cache can never hold; the message names it. Or an out-of-memory
                error that smaller steps cannot avoid: at a single token, on one tensor-parallel rank only, or
                with pipeline stages, whose messages are in flight.
            NonFiniteLogits: logits are NaN or Inf; it has the requests. On all ranks of the pipeline and
                tensor-parallel groups.
        """
        assert self._cache is not None, "a generation phase is used inside its with block"
        if not requests:
            return
        queue = GenerationQueue(
            requests,
            num_pages=self.num_pages,
            page_size=self.batch.page_size,
            max_batch=max(self.batch.max_batch, self.num_groups),
            max_step_tokens=self.batch.max_step_tokens,
            num_groups=self.num_groups,
            stop_check=stop_check,
        )
        try:
            while not queue.is_finished:
                try:
                    yield from run_queue(
                        self._stage_for(sampling),
                        queue,
                        num_groups=self.num_groups,
                        ticks=self.ticks,
                        when_idle=when_idle,
                    )
                except torch.OutOfMemoryError as error:
                    self._shrink(queue, error)
        finally:
            queue.close()

    def _shrink(self, queue: GenerationQueue, error: torch.OutOfMemoryError) -> None:
        """Halve the size of steps after one ran out of memory, or raise ValueError; see `run`."""
        topology, most = self.topology, 0
        if topology.layout.pp == 1 and has_failed_on_peers(topology.rank, [topology.tp_group]):
            most = queue.shrink()
        if not most:
            raise ValueError(
                f"rank {topology.rank} is out of memory in a step of generation, which cannot be made "
                "smaller with pipeline stages, on one tensor-parallel rank only, or at a single token: lower "
                f"generation.max_step_tokens, generation.max_batch or generation.cache_bytes ({error})"
            ) from error
        self.batch = replace(self.batch, max_batch=min(self.batch.max_batch, most), max_step_tokens=most)
        self._stage = None  # and its captured steps
        if topology.device.type == "cuda":
            torch.cuda.empty_cache()
        log_rank(
            f"out of memory in a step of generation: at most {most} tokens per step, and as many sequences "
            "at once, for the rest of the phase",
            topology.rank,
        )

    def _stage_for(self, sampling: SamplingSettings) -> GenerationStage:
        """Return the stage for a sampling distribution; captured steps are kept while it is the same."""
        if self._stage is None or self._stage.settings is not sampling:
            self._stage = GenerationStage(
                self._chunks, self._cache, sampling, longest=self._longest, record=self._record
            )
        return self._stage

    def _plan_pages(self, longest: int) -> int:
        """Return the number of pages of the pool, the same on all ranks that share the queue."""
        glm, layout = self._chunks[0].glm, self.topology.layout
        options = {"page_size": self.batch.page_size, "dtype": self._chunks[0].dtype}
        # One page per sequence more than it fills: the last page of a shared prompt is copied.
        most = self.batch.max_batch * (-(-longest // self.batch.page_size) + 1)
        if self.batch.cache_bytes is not None:
            return min(most, num_pages_within(self.batch.cache_bytes, glm, layout, **options))
        if self.topology.device.type == "cuda":
            torch.cuda.empty_cache()  # returns memory that training freed from the allocator to the device
            free_bytes, _ = torch.cuda.mem_get_info(self.topology.device)
            fitting = num_pages_within(int(free_bytes * _SHARE_OF_FREE_MEMORY), glm, layout, **options)
            return self._smallest(min(most, fitting))
        return most

    def _smallest(self, num_pages: int) -> int:
        """Return the smallest number among the ranks of the model, which all run the same schedule."""
        least = torch.tensor([num_pages], device=self.topology.device)
        for group in (self.topology.tp_group, self.topology.pp_group):
            torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
        return int(least)


def deal_by_length(lengths: Sequence[int], *, rank: int, num_ranks: int) -> list[int]:
    """Return the indices of the sequences of a rank: longest first, assigned in alternating rank order.

    Every index goes to exactly one of `num_ranks` ranks; their total lengths differ by at most the longest.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    indices = []
    for turn, index in enumerate(order):
        lap, position = divmod(turn, num_ranks)
        if (position if lap % 2 == 0 else num_ranks - 1 - position) == rank:
            indices.append(index)
    return indices
