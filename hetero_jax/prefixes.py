"""Which pages of a pool hold which beginnings of prompts, so that sequences share them instead of computing them again.

A page is known by a key that stands for all tokens up to its end (a chain of hashes, as in vLLM's automatic prefix
caching): equal keys, equal contents, since what is kept of a token depends on the tokens up to it alone. Only pages
that are full of prompt and computed are known; nobody writes there again, until a page that nobody uses any more is
given to somebody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

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

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}  # of pages
        self._awaited: dict[bytes, int] = {}  # and by which sequence

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of as many of the first keys as are known."""
        found: list[int] = []
        for key in keys:
            if key not in self._pages:
                break
            found.append(self._pages[key])
        return found

    def last_awaited(self, keys: Iterable[bytes]) -> bytes | None:
        """The last that is awaited of those first keys that are all known or awaited; None where none is."""
        last: bytes | None = None
        for key in keys:
            if key in self._awaited:
                last = key
            elif key not in self._pages:
                break
        return last

    def is_awaited(self, key: bytes) -> bool:
        """Whether a sequence is about to compute it."""
        return key in self._awaited

    def expect(self, keys: Iterable[bytes], seq_id: int) -> None:
        """A sequence is about to compute these, but for those that are known or that another one computes."""
        for key in keys:
            if key not in self._pages:
                self._awaited.setdefault(key, seq_id)

    def learn(self, key: bytes, page: int) -> None:
        """A page is computed; the first of several with one key is the one that is shared."""
        self._awaited.pop(key, None)
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

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
            if (key := self._keys.pop(page, None)) is not None:
                del self._pages[key]
