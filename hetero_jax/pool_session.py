"""What serves one pool, as tier 2 sees it: a worker, or several that have the heads of every sequence between them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hetero_jax.attention_layout import GroupedLayout
from hetero_jax.depth import CallTimes
from hetero_jax.tracing import Trace


class PoolSession(Protocol):
    """address: for messages. times: of its calls."""

    address: str
    num_pages: int
    pool_bytes: int

    @property
    def times(self) -> CallTimes: ...

    def place(self, rows: np.ndarray, layout: GroupedLayout) -> PlacedRows:
        """Send the layout of these rows, at least one, once for all sites of a microbatch."""
        ...


class PendingCall(Protocol):
    """A call of a pool, under way."""

    def traced_by(self, trace: Trace, name: str) -> None:
        """Tell the trace of it once it is back."""
        ...

    def is_ready(self) -> bool:
        """Whether `rows` need not wait; looks for what has come."""
        ...

    def rows(self) -> np.ndarray | None:
        """The answer; None where the pool is lost. Raises WorkerError where it failed otherwise."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedRows(ABC):
    """A pool's part of the calls of a microbatch.

    rows: [n] of the call.
    num_rows: of the pool's call: n and padding, whose contents do not matter.
    """

    rows: np.ndarray
    num_rows: int

    def take(self, array: np.ndarray) -> np.ndarray:
        """[num_rows, ...] of an array [R, ...]; a view where the rows stand together."""
        if self.is_whole(len(array)):
            return array
        first, count = int(self.rows[0]), len(self.rows)
        if first + self.num_rows <= len(array) and self._are_together:
            return array[first : first + self.num_rows]
        taken = np.zeros((self.num_rows, *array.shape[1:]), array.dtype)
        taken[:count] = array[self.rows]
        return taken

    def is_whole(self, num_rows: int) -> bool:
        """The pool's call is that of `num_rows` rows, padding included."""
        return self.num_rows == num_rows and self._are_together and self.rows[0] == 0

    @functools.cached_property
    def _are_together(self) -> bool:
        return bool((np.diff(self.rows) == 1).all())

    @abstractmethod
    def attend(self, site: int, inputs: Sequence[np.ndarray], row_shape: tuple[int, ...]) -> PendingCall:
        """Send what `take` gave of q, k and v, or of q alone where the site shares a pool; answers [R, *row_shape]."""
