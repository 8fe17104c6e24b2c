"""Which pages of a pool hold which beginnings of prompts, so that sequences share them instead of computing them again.

A page is known by a key that stands for all tokens up to its end (a chain of hashes, as in vLLM's automatic prefix
caching): equal keys, equal contents, since what is kept of a token depends on the tokens up to it alone. Only pages
that are full of prompt and computed are known; nobody writes there again, until a page that nobody uses any more is
given to somebody else. What one key stands for is in a page of each group of sites, which come and go on their own:
those of a group with a window are needed only as far as it reaches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def page_keys(tokens: Sequence[int], page_size: int) -> tuple[bytes, ...]:
    """A key of each page that the tokens fill."""
    keys: list[bytes] = []
    ids = np.asarray(tokens, np.int64)
    for end in range(page_size, len(ids) + 1, page_size):
        before = keys[-1] if keys else b""
        keys.append(hashlib.sha256(before + ids[end - page_size : end].tobytes()).digest())
    return tuple(keys)


class Prefixes:
    """The known pages of one pool, and which sequences are about to compute more of them."""

    def __init__(self, num_groups: int = 1) -> None:
        self.num_groups = num_groups
        self._pages: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        self._keys: dict[int, tuple[int, bytes]] = {}  # of pages, and of which group they are
        self._awaited: dict[bytes, int] = {}  # and by which sequence

    def num_found(self, keys: Sequence[bytes], first_needed: Sequence[Callable[[int], int]]) -> int:
        """How many of the first keys a sequence may begin behind: the most whose pages that it needs are known.

        Args:
          first_needed: of each group, the first page that is needed behind so many, as are all from there on; never
            an earlier one for more.
        """
        found = 0
        needs_all = [first(len(keys)) == 0 for first in first_needed]
        runs = [0] * self.num_groups  # known pages up to here without a gap
        for count, key in enumerate(keys, 1):
            runs = [run + 1 if key in pages else 0 for run, pages in zip(runs, self._pages, strict=True)]
            if all(run >= count - first(count) for run, first in zip(runs, first_needed, strict=True)):
                found = count
            elif any(all_needed and run < count for run, all_needed in zip(runs, needs_all, strict=True)):
                break
        return found

    def pages(self, group: int, keys: Iterable[bytes]) -> list[int]:
        """Of keys that are known to a group."""
        return [self._pages[group][key] for key in keys]

    def last_awaited(self, keys: Iterable[bytes]) -> bytes | None:
        """The last that is awaited of those first keys that are all known or awaited; None where none is."""
        last: bytes | None = None
        for key in keys:
            if key in self._awaited:
                last = key
            elif not self._is_known(key):
                break
        return last

    def _is_known(self, key: bytes) -> bool:
        return all(key in pages for pages in self._pages)

    def is_awaited(self, key: bytes) -> bool:
        """Whether a sequence is about to compute it."""
        return key in self._awaited

    def expect(self, keys: Iterable[bytes], seq_id: int) -> None:
        """A sequence is about to compute these, but for those that are known or that another one computes."""
        for key in keys:
            if not self._is_known(key):
                self._awaited.setdefault(key, seq_id)

    def learn(self, key: bytes, pages: Sequence[int]) -> None:
        """A page of each group is computed; the first of several with one key is the one that is shared."""
        self._awaited.pop(key, None)
        for group, page in enumerate(pages):
            if key not in self._pages[group]:
                self._pages[group][key] = page
                self._keys[page] = group, key

    def give_up(self, keys: Iterable[bytes], seq_id: int) -> None:
        """A sequence computes no more of these."""
        for key in keys:
            if self._awaited.get(key) == seq_id:
                del self._awaited[key]

    def __contains__(self, page: int) -> bool:
        """Whether it is a known page."""
        return page in self._keys

    def forget(self, pages: Iterable[int]) -> None:
        """These pages are about to hold something else."""
        for page in pages:
            if (known := self._keys.pop(page, None)) is not None:
                group, key = known
                del self._pages[group][key]
