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
    """Hands out page numbers below `num_pages`, all or nothing.

    The order depends on the calls only. Pages freed last are given first: they are the ones that the caches may still
    know.
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))  # a stack; the next one is at the end
        self._in_use = bytearray(num_pages)

    @property
    def num_pages(self) -> int:
        return len(self._in_use)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._in_use) - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages, or None (and nothing changed) where fewer are free."""
        assert count >= 0, f"count={count}; allowed: >= 0"
        if count > len(self._free):
            return None
        split = len(self._free) - count
        pages = self._free[split:][::-1]
        del self._free[split:]
        for page in pages:
            self._in_use[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back. A page that is not in use is a bug of the caller, hence an assertion."""
        for page in pages:
            in_use = 0 <= page < len(self._in_use) and self._in_use[page]
            assert in_use, f"page {page} is not in use"
            self._in_use[page] = 0
            self._free.append(page)
