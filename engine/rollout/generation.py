"""Answers to prompts, generated on the ranks and weights that train."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.engine.rollout.queue import Completion, GenerationQueue, GenerationRequest
from glm_rlhf.parallel.generation import TickCount, run_queue
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.kv_cache import KVCache, num_pages_within
from glm_rlhf.parallel.token_draw import SamplingSettings
from glm_rlhf.parallel.topology import Topology

_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How much is generated at once."""

    max_batch: int
    """Sequences that run at once on a copy of the model."""
    max_step_tokens: int
    """Tokens that go through the model in a step."""
    page_size: int
    """Positions a page of the cache."""
    cache_bytes: int | None = None
    """Memory of the cache a rank; None takes what `max_batch` of the longest sequences need, on CUDA at most
    80 % of what is free."""


class GenerationPhase:
    """Owns what generation needs beside the weights, the cache above all, while it lasts.

    A context manager: training may have the memory again after it. The weights stay where they are.
    """

    def __init__(
        self,
        chunks: Sequence[GLMModel],
        *,
        topology: Topology,
        batch: BatchSettings,
        longest: int,
    ) -> None:
        """Plan a phase on a policy.

        Args:
            chunks: this rank's chunks of the policy.
            topology: layout and groups.
            batch: how much at once.
            longest: positions of the longest sequence that may come, prompt and answer.
        """
        self.chunks, self.topology, self.batch = chunks, topology, batch
        self.num_groups = topology.layout.pp
        self.num_pages = self._plan_pages(longest)
        self.ticks = TickCount()
        self._cache: KVCache | None = None

    def __enter__(self) -> "GenerationPhase":
        self._cache = KVCache(self.chunks, num_pages=self.num_pages, page_size=self.batch.page_size)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._cache = None

    def run(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingSettings,
        *,
        stop_check: Callable[[Sequence[int]], bool] | None = None,
    ) -> Iterator[Completion]:
        """Yield completions as they end, the same on every rank of the pipeline and tensor-parallel groups.

        Args:
            requests: this data-parallel rank's prompts.
            sampling: the distribution.
            stop_check: says of an answer's tokens so far whether it ends here, beside its stop ids.

        Raises:
            ValueError: a request that the cache can never hold; the message names it.
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
            yield from run_queue(
                self.chunks,
                self._cache,
                queue,
                sampling,
                topology=self.topology,
                num_groups=self.num_groups,
                ticks=self.ticks,
            )
        finally:
            queue.close()

    def _plan_pages(self, longest: int) -> int:
        """Return the pages of the pool, the same on every rank that shares the queue."""
        glm, layout = self.chunks[0].glm, self.topology.layout
        options = {"page_size": self.batch.page_size, "dtype": self.chunks[0].config.params_dtype}
        # One page a sequence more than it fills: shared prompts are copied on write.
        wanted = self.batch.max_batch * (-(-longest // self.batch.page_size) + 1)
        if self.batch.cache_bytes is not None:
            return min(wanted, num_pages_within(self.batch.cache_bytes, glm, layout, **options))
        if self.topology.device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(self.topology.device)
            fitting = num_pages_within(int(free_bytes * _SHARE_OF_FREE_MEMORY), glm, layout, **options)
            return self._smallest(min(wanted, fitting))
        return wanted

    def _smallest(self, num_pages: int) -> int:
        """Return the least that any rank of the model has room for: all replay one queue."""
        least = torch.tensor([num_pages], device=self.topology.device)
        for group in (self.topology.tp_group, self.topology.pp_group):
            torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
        return int(least)


def deal_by_length(lengths: Sequence[int], *, rank: int, num_ranks: int) -> list[int]:
    """Return the indices of the sequences that a rank takes: longest first, dealt there and back again.

    Every index goes to exactly one of `num_ranks` ranks, and their totals differ by at most the longest.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    taken = []
    for turn, index in enumerate(order):
        lap, place = divmod(turn, num_ranks)
        if (place if lap % 2 == 0 else num_ranks - 1 - place) == rank:
            taken.append(index)
    return taken
