"""Which pages of the KV pool are free.

A page is a fixed run of token positions, in each of the arrays of a KV pool. One numbering serves all arrays, so one
allocator serves the whole model: a page belongs to one group of sites (`hetero_jax/page_groups.py`) at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable


def pages_for(num_positions: int, page_size: int) -> int:
    """Pages that hold positions [0, num_positions)."""
    return -(-num_positions // page_size)


class PageAllocator:
    """Hands out page numbers below `num_pages`, all or nothing; a page may have several users.

    The order depends on the calls only. Pages freed last are given first: they are the ones that the caches may still
    know. Pages worth keeping, whose contents may be wanted again, are given last of all, the oldest first.
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))  # a stack; the next one is at the end
        self._kept: dict[int, None] = {}  # free as well; the next one is at the beginning
        self._num_users = [0] * num_pages

    @property
    def num_pages(self) -> int:
        return len(self._num_users)

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def num_users(self, page: int) -> int:
        """How often the page must be given back before it is free."""
        return self._num_users[page]

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages, or None (and nothing changed) where fewer are free."""
        assert count >= 0, f"count={count}; allowed: >= 0"
        if count > self.num_free:
            return None
        split = max(0, len(self._free) - count)
        pages = self._free[split:][::-1]
        del self._free[split:]
        pages += itertools.islice(self._kept, count - len(pages))
        for page in pages:
            self._kept.pop(page, None)
            self._num_users[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One user more for each of these, which are in use or kept. Else it is a bug of the caller: an assertion."""
        for page in pages:
            known = 0 <= page < self.num_pages and (self._num_users[page] > 0 or page in self._kept)
            assert known, f"page {page} is not in use"
            self._kept.pop(page, None)
            self._num_users[page] += 1

    def free(self, pages: Iterable[int], keep: Container[int] = ()) -> None:
        """One user less for each of these, which are in use (an assertion as well); `keep`: those worth keeping."""
        for page in pages:
            in_use = 0 <= page < self.num_pages and self._num_users[page] > 0
            assert in_use, f"page {page} is not in use"
            self._num_users[page] -= 1
            if self._num_users[page]:
                continue
            if page in keep:
                self._kept[page] = None
            else:
                self._free.append(page)
