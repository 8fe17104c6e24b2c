"""Rows of several arrays side by side as the bytes of one: what a site without a kernel takes and gives on the wire."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from hetero_jax.errors import ConfigError


@dataclass(frozen=True)
class JoinedRows:
    """kinds: shape of a row and element type of each array, as it travels."""

    kinds: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[tuple[int, ...], Any]], wire_dtype: str) -> JoinedRows:
        """Of rows as they are computed: floats travel as `wire_dtype`, a float type, anything else as it is."""
        return cls(
            tuple(
                (shape, jnp.dtype(wire_dtype if jnp.issubdtype(dtype, jnp.floating) else dtype))
                for shape, dtype in rows
            )
        )

    @property
    def num_bytes(self) -> int:
        """Of a row."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) * dtype.itemsize for shape, dtype in self.kinds]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[R, num_bytes] uint8 of arrays [R, *shape]."""
        assert [(array.shape[1:], array.dtype) for array in arrays] == list(self.kinds)
        flat = [np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) for array in arrays]
        return np.concatenate(flat, axis=1)

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """The arrays [R, *shape] that were joined.

        Raises:
          ConfigError: rows of other bytes.
        """
        if rows.dtype != np.uint8 or rows.shape[1:] != (self.num_bytes,):
            raise ConfigError(f"rows {rows.dtype}{list(rows.shape)}; allowed: uint8[rows, {self.num_bytes}]")
        ends = np.cumsum(self._sizes)[:-1]
        parts = [np.ascontiguousarray(part) for part in np.split(rows, ends, axis=1)]
        return [
            part.view(dtype).reshape(len(rows), *shape) for part, (shape, dtype) in zip(parts, self.kinds, strict=True)
        ]
