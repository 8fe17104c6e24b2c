"""Rows as they travel between engine and worker: in bfloat16, float32, or int8 with a scale for each row and head.

What is counted or flagged (ids, padding), as sites without a kernel may take it, travels as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hetero_jax.errors import ConfigError

WIRE_DTYPES = ("bfloat16", "float32", "int8")
_SCALE_BYTES = 4
_MOST = 127


@functools.partial(jax.jit, static_argnames="dtype")
def to_wire(rows: Sequence[jax.Array], dtype: str) -> tuple[jax.Array, ...]:
    """Arrays as they travel: [R, heads, dim] of floats; for a float `dtype` [R, ...] of anything.

    Returns:
      [R, heads, dim] bfloat16 or float32; or [R, heads, dim + 4] int8: numbers in [-127, 127] and then the four bytes
      of a float32, a 127th of the head's largest magnitude, which they are to be multiplied by.
    """
    return tuple(_wired(array, dtype) for array in rows)


@functools.partial(jax.jit, static_argnames="dtype")
def from_wire(rows: Sequence[jax.Array], dtype: Any) -> tuple[jax.Array, ...]:
    """The arrays [R, heads, dim] in `dtype` that `to_wire` made these of.

    Raises:
      ConfigError: int8 without room for a scale.
    """
    return tuple((_restored(array) if array.dtype == jnp.int8 else array).astype(dtype) for array in rows)


def wired_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Of what `to_wire` makes of an array of this shape."""
    return (*shape[:-1], shape[-1] + _SCALE_BYTES) if dtype == "int8" else shape


def _wired(rows: jax.Array, dtype: str) -> jax.Array:
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    return _quantised(rows) if dtype == "int8" else rows.astype(dtype)


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
