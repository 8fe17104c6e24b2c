"""Rows as they travel between engine and worker: in bfloat16, float32, or int8 with a scale for each row and head.

What is counted or flagged (ids, padding), as sites without a kernel may take it, travels as it is. Both ends convert
within the executables that make and take the rows, so that a call of its own, which costs more than the conversion, is
not needed. From there to NumPy bfloat16 goes as its bits: of other types than Python's own, JAX gives no view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from hetero_jax.errors import ConfigError

WIRE_DTYPES = ("bfloat16", "float32", "int8")
_SCALE_BYTES = 4
_MOST = 127


def to_wire(rows: Sequence[jax.Array], dtype: str) -> tuple[jax.Array, ...]:
    """What `on_host` makes the arrays of that travel: of [R, heads, dim] floats; for a float `dtype` [R, ...] anything.

    Returns:
      [R, heads, dim] float32, or the bits of bfloat16 as uint16; or [R, heads, dim + 4] int8: numbers in [-127, 127]
      and then the four bytes of a float32, a 127th of the head's largest magnitude, which they are to be multiplied by.
    """
    return tuple(_wired(array, dtype) for array in rows)


def on_host(wired: Iterable[jax.Array]) -> list[np.ndarray]:
    """What travels, of what `to_wire` gave; waits for it."""
    arrays = [np.asarray(array) for array in wired]
    return [array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array for array in arrays]


def from_wire(wired: jax.Array, wire_dtype: str, dtype: Any) -> jax.Array:
    """The array [R, ...] in `dtype` that this one was made of, which has travelled.

    Raises:
      ConfigError: int8 without room for a scale.
    """
    return (_restored(wired) if wire_dtype == "int8" else wired).astype(dtype)


def wired_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Of what `to_wire` makes of an array of this shape."""
    return (*shape[:-1], shape[-1] + _SCALE_BYTES) if dtype == "int8" else shape


def _wired(rows: jax.Array, dtype: str) -> jax.Array:
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    if dtype == "int8":
        return _quantised(rows)
    found = rows.astype(dtype)
    return jax.lax.bitcast_convert_type(found, jnp.uint16) if dtype == "bfloat16" else found


def _quantised(rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32)
    scale = jnp.max(jnp.abs(rows), axis=-1, keepdims=True, initial=0) / _MOST
    numbers = jnp.round(rows / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return jnp.concatenate([numbers, jax.lax.bitcast_convert_type(scale, jnp.int8)[..., 0, :]], axis=-1)


def _restored(wired: jax.Array) -> jax.Array:
    if wired.ndim != 3 or wired.shape[-1] <= _SCALE_BYTES:
        raise ConfigError(f"int8 rows {wired.shape}; allowed: [rows, heads, dim + {_SCALE_BYTES}]")
    scale = jax.lax.bitcast_convert_type(wired[..., -_SCALE_BYTES:], jnp.float32)
    return wired[..., :-_SCALE_BYTES].astype(jnp.float32) * scale[..., None]
