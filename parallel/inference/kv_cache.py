"""Keys and values of running sequences, in pages of a pool that exists only during generation."""

from collections.abc import Sequence

import torch

from glm_rlhf.parallel.inference.weight_views import ChunkWeights
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig


class KVCache:
    """Owns the pools of this rank's layers; the scheduler allocates the pages."""

    def __init__(self, chunks: Sequence[ChunkWeights], *, num_pages: int, page_size: int) -> None:
        """Allocate the pools, uninitialised.

        Args:
            chunks: parameters of this rank's model chunks.
            num_pages: pages in every layer's pool.
            page_size: positions per page.

        Raises:
            ValueError: num_pages or page_size is below 1.
        """
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a cache needs pages: num_pages is {num_pages}, page_size is {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        num_layers = sum(len(chunk.layers) for chunk in chunks)
        self._pools = torch.empty(
            (num_layers, 2, num_pages, page_size, chunks[0].num_kv_heads, chunks[0].glm.head_size),
            dtype=chunks[0].dtype,
            device=chunks[0].topology.device,
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the pools."""
        return self._pools.numel() * self._pools.element_size()

    def layer(self, index: int) -> torch.Tensor:
        """Return the pools of this rank's layer `index`: keys, then values, [2, pages, page_size, K, H]."""
        return self._pools[index]

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages in every layer, source to target; no page is both."""
        if copies:
            pairs = torch.tensor(copies, pin_memory=self._pools.is_cuda)
            sources, targets = pairs.to(self._pools.device, non_blocking=True).unbind(1)
            self._pools[:, :, targets] = self._pools[:, :, sources]


def num_pages_within(
    budget_bytes: int, glm: GLMConfig, layout: Layout, *, page_size: int, dtype: torch.dtype
) -> int:
    """Return the number of pages that fit into a rank's budget.

    A page holds keys and values of `page_size` positions in every layer of the rank:
    2 · layers/pp · page_size · K/tp · H elements.

    Raises:
        ValueError: the budget is smaller than one page; the message gives the size of a page.
    """
    num_kv_heads = max(1, glm.num_kv_heads // layout.tp)
    elements = 2 * (glm.num_layers // layout.pp) * page_size * num_kv_heads * glm.head_size
    page_bytes = elements * dtype.itemsize
    if budget_bytes < page_bytes:
        raise ValueError(
            f"a cache of {budget_bytes} bytes holds no page: one takes {page_bytes} bytes; raise "
            "generation.cache_bytes if it is set, else the weights leave no memory for a cache"
        )
    return budget_bytes // page_bytes
