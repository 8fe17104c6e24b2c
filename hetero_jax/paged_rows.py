"""Paged arrays of any row shape, and one call over the rows of many sequences, in plain jax.numpy.

What both forms of attention without a kernel share: softmax attention over keys and values, and a site's own subgraph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hetero_jax.attention_layout import TILE_ROWS, AttentionLayout

# (rows [Q] of the call, page_table [P], positions [Q]) -> arrays [Q, ...]
AttendRows = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]


def held_dtype(dtype: Any) -> Any:
    """The element type of an array that holds `dtype`.

    16-bit floats are held as uint16: XLA CPU scatters and gathers bfloat16 by way of an f32 copy of the whole array,
    and a bit cast of the array around them costs a copy too.
    """
    dtype = jnp.dtype(dtype)
    is_short = dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)
    return jnp.dtype(jnp.uint16) if is_short else dtype


def append(pages: jax.Array, rows: jax.Array, slots: jax.Array, dtype: Any) -> jax.Array:
    """Pages [num_pages, page_size, ...] of `dtype` with rows [R, ...] at slots [R]; slots past the end are dropped."""
    held = rows.astype(dtype)
    if held_dtype(dtype) != held.dtype:
        held = jax.lax.bitcast_convert_type(held, pages.dtype)
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat.at[slots].set(held, mode="drop").reshape(pages.shape)


def gather(pages: jax.Array, page_table: jax.Array, dtype: Any) -> jax.Array:
    """[P * page_size, ...] of `dtype`: the rows of a sequence with page table [P]."""
    found = pages[page_table]
    if held_dtype(dtype) != jnp.dtype(dtype):
        found = jax.lax.bitcast_convert_type(found, jnp.dtype(dtype))
    return found.reshape(-1, *found.shape[2:])


def over_sequences(layout: AttentionLayout, num_rows: int, attend: AttendRows) -> tuple[jax.Array, ...]:
    """`attend` for every row: sequences with one row together, chunks of several tile by tile.

    Returns:
      [num_rows, ...] of each array that `attend` gives; rows of no sequence are 0.
    """
    shape = jax.ShapeDtypeStruct((1,), jnp.int32)
    found = jax.eval_shape(attend, shape, jax.ShapeDtypeStruct(layout.page_table.shape[1:], jnp.int32), shape)
    out = tuple(jnp.zeros((num_rows, *array.shape[1:]), array.dtype) for array in found)
    if layout.decode.shape[0]:
        out = _decode_rows(layout, num_rows, attend, out)
    if layout.tile_sequence.shape[0]:
        out = _prefill_tiles(layout, num_rows, attend, out)
    return out


def _decode_rows(
    layout: AttentionLayout, num_rows: int, attend: AttendRows, out: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    first, context = layout.first_row[layout.decode], layout.context[layout.decode]  # [A]
    rows = jax.vmap(attend)(first[:, None], layout.page_table[layout.decode], (context - 1)[:, None])
    target = jnp.where(layout.num_rows[layout.decode] == 1, first, num_rows)
    return tuple(array.at[target].set(new[:, 0], mode="drop") for array, new in zip(out, rows, strict=True))


def _prefill_tiles(
    layout: AttentionLayout, num_rows: int, attend: AttendRows, out: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    def tile(step: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        sequence, offset = step
        count, first = layout.num_rows[sequence], layout.first_row[sequence]
        row = offset + jnp.arange(TILE_ROWS)  # within the sequence's rows
        source = jnp.minimum(first + row, num_rows - 1)
        rows = attend(source, layout.page_table[sequence], layout.context[sequence] - count + row)
        return rows, jnp.where(row < count, source, num_rows)

    rows, target = jax.lax.map(tile, (layout.tile_sequence, layout.tile_offset))
    flat = target.reshape(-1)
    return tuple(
        array.at[flat].set(new.reshape(-1, *new.shape[2:]), mode="drop") for array, new in zip(out, rows, strict=True)
    )
