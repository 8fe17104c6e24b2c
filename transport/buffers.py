"""Memory for the bodies of frames, used again once nothing looks at it any more."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]  # one axis, contiguous
Tensor: TypeAlias = npt.NDArray[Any]  # of one of `header.DTYPES`

ALIGNMENT = 64  # bytes; XLA's CPU backend takes arrays without a copy from here on
EMPTY: Bytes = np.empty(0, np.uint8)
_SMALLEST_KEPT = 1 << 18
_MOST_KEPT = 8


class BufferPool:
    """Aligned buffers. One that was taken comes back by itself when the last view of it is gone.

    Pages that the operating system has already given need not be given and zeroed again: for large frames that costs
    as much as a fifth of the transfer. Not for use by several threads; views may die in any thread.
    """

    def __init__(self) -> None:
        # Oldest first. A deque because views may die, and append here, in other threads.
        self._free: deque[Bytes] = deque(maxlen=_MOST_KEPT)

    def reuse(self, size: int) -> Bytes | None:
        """A free buffer of `size` bytes; None where none of at most four times that size is free."""
        for _ in range(len(self._free)):
            memory = self._free.popleft()
            if size <= len(memory) <= 4 * size:
                return self._lend(memory, size)
            self._free.append(memory)
        return None

    def allocate(self, size: int) -> Bytes:
        """A new buffer of `size` bytes."""
        return self._lend(_aligned(size), size)

    def take(self, size: int) -> Bytes:
        """A buffer of `size` bytes, new where none is free."""
        free = self.reuse(size)
        return self.allocate(size) if free is None else free

    def _lend(self, memory: Bytes, size: int) -> Bytes:
        if len(memory) < _SMALLEST_KEPT:
            return memory
        # Views of `lent` keep `lent` alive, but not each other: NumPy looks through to what is no array.
        lent = np.frombuffer(memory.data[:size], np.uint8)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent


def _aligned(size: int) -> Bytes:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]
