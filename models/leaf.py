"""One leaf of a module and the tensors that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# read(name, shape) gives the named tensor, matrices as [out, in], and raises if its shape is another one
TensorReader = Callable[[str, tuple[int, ...]], np.ndarray]
Path = tuple[Any, ...]  # ("blocks", 3, "mlp", "down")


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf of the module: its sources side by side along the last axis, as [in, out] where `is_kernel`.

    With `experts`, the sources are that many equal groups; the leaf is [experts, ...], a group each.
    """

    path: Path
    sources: Mapping[str, tuple[int, ...]]  # tensor name -> shape
    is_kernel: bool = False
    experts: int | None = None

    def read(self, read: TensorReader, dtype: np.dtype) -> jax.Array:
        """The leaf in `dtype` on the default device."""
        if self.experts is None:
            return jnp.asarray(self._join(list(self.sources.items()), read, dtype))
        named = list(self.sources.items())
        size = len(named) // self.experts
        groups = [named[start : start + size] for start in range(0, len(named), size)]
        return jnp.asarray(np.stack([self._join(group, read, dtype) for group in groups]))

    def _join(self, named: list[tuple[str, tuple[int, ...]]], read: TensorReader, dtype: np.dtype) -> np.ndarray:
        # cast before joining: the f32 form of a large leaf never exists as a whole
        parts = [read(name, shape).astype(dtype, copy=False) for name, shape in named]
        if self.is_kernel:
            parts = [part.T for part in parts]
        return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=-1)
