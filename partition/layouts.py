"""How values of the model become rows for tier 2 and back."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from partition.jaxpr import Value


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A token value as [rows, *inner].

    shape: of the value, as traced. row_axis: the axis of it that counts rows.
    order: which element of a row of the value comes first, second ...; None: as they are.
    """

    shape: tuple[int, ...]
    row_axis: int
    inner: tuple[int, ...]
    order: tuple[int, ...] | None = None

    def to_canonical(self, array: jax.Array) -> jax.Array:
        """[rows, *inner] from the model's layout."""
        rows = array.shape[self.row_axis]
        flat = jnp.moveaxis(array, self.row_axis, 0).reshape(rows, -1)
        flat = flat if self.order is None else flat[:, np.array(self.order)]
        return flat.reshape(rows, *self.inner)

    def from_canonical(self, array: jax.Array) -> jax.Array:
        """The model's layout from [rows, *inner]."""
        rows = array.shape[0]
        flat = array.reshape(rows, -1)
        flat = flat if self.order is None else flat[:, np.argsort(self.order)]
        return jnp.moveaxis(flat.reshape(rows, *self._others), 0, self.row_axis)

    @property
    def _others(self) -> tuple[int, ...]:
        return (*self.shape[: self.row_axis], *self.shape[self.row_axis + 1 :])


@dataclass(frozen=True, kw_only=True, eq=False)
class Port:
    """A value that enters or leaves a site. is_cached: it enters on the key side, so tier 2 keeps it."""

    name: str
    value: Value
    layout: Layout
    is_cached: bool = False


def rows_first(value: Value, row_axis: int) -> Layout:
    """The value as it is, its row axis first."""
    shape = value.shape
    return Layout(shape=shape, row_axis=row_axis, inner=(*shape[:row_axis], *shape[row_axis + 1 :]))


def ordered(layout: Layout, inner: tuple[int, ...], order: np.ndarray) -> Layout:
    """The same row with its elements in `order`, as `inner`."""
    is_identity = np.array_equal(order, np.arange(len(order)))
    order_or_none = None if is_identity else tuple(int(index) for index in order)
    return Layout(shape=layout.shape, row_axis=layout.row_axis, inner=inner, order=order_or_none)
