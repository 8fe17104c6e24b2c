"""Which pages of the KV pool are free.

A page is a fixed run of token positions in the KV pool of one site. All sites share one numbering: page 7 of a
sequence is page 7 in every pool, so one allocator and one page table per sequence serve the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable


def pages_for(num_positions: int, page_size: int) -> int:
    """Pages that hold positions [0, num_positions)."""
    return -(-num_positions // page_size)


class PageAllocator:
    """Hands out page numbers below `num_pages`, all or nothing; a page may have several users.

    The order depends on the calls only. Pages freed last are given first: they are the ones that the caches may still
    know.
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))  # a stack; the next one is at the end
        self._num_users = [0] * num_pages

    @property
    def num_pages(self) -> int:
        return len(self._num_users)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._num_users) - len(self._free)

    def num_users(self, page: int) -> int:
        """How often the page must be given back before it is free."""
        return self._num_users[page]

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages, or None (and nothing changed) where fewer are free."""
        assert count >= 0, f"count={count}; allowed: >= 0"
        if count > len(self._free):
            return None
        split = len(self._free) - count
        pages = self._free[split:][::-1]
        del self._free[split:]
        for page in pages:
            self._num_users[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One user more for each of these. A page that is not in use is a bug of the caller, hence an assertion."""
        for page in pages:
            self._check_in_use(page)
            self._num_users[page] += 1

    def free(self, pages: Iterable[int]) -> list[int]:
        """One user less for each of these; those that are free now. For pages that are not in use, as `share`."""
        freed: list[int] = []
        for page in pages:
            self._check_in_use(page)
            self._num_users[page] -= 1
            if self._num_users[page] == 0:
                freed.append(page)
        self._free += freed
        return freed

    def _check_in_use(self, page: int) -> None:
        in_use = 0 <= page < len(self._num_users) and self._num_users[page] > 0
        assert in_use, f"page {page} is not in use"
