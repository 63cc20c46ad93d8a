"""Reference counts of the pages of the key/value cache."""

import heapq
from collections.abc import Iterable

__all__ = ["OutOfPages", "PagePool"]


class OutOfPages(RuntimeError):
    """More pages were requested than are free; none was taken."""


class PagePool:
    """Pages 0 … num_pages − 1, each free or with a number of owners.

    The lowest free pages are taken first, so that the same calls take the same pages on all ranks.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a pool needs at least one page")
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def num_owners(self, page: int) -> int:
        """Return the number of owners of `page`; 0: free."""
        return self._num_owners[page]

    def take(self, count: int) -> list[int]:
        """Return `count` pages, lowest first, which get one owner each.

        Raises:
            OutOfPages: fewer than `count` are free.
        """
        assert count >= 0, count
        if count > len(self._free):
            raise OutOfPages(f"{count} pages requested, {len(self._free)} of {self.num_pages} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one owner to each of `pages`, none of which may be free."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is shared but has no owner"
            self._num_owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove one owner from each of `pages`; a page without owners is free."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is released but has no owner"
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                heapq.heappush(self._free, page)

    def assert_all_free(self) -> None:
        """Fail if a page still has an owner: it is leaked."""
        owned = {page: count for page, count in enumerate(self._num_owners) if count}
        assert not owned, f"leaked pages, with their numbers of owners: {owned}"
        assert sorted(self._free) == list(range(self.num_pages)), "the list of free pages is damaged"
