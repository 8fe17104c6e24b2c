"""Paged causal attention: the pool, the layout of a call, and the operator in plain jax.numpy.

`paged_attention` is the one door to tier 2's arithmetic. This form is the oracle: readable, any backend, slow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition import AttentionSpec

# Rows of one prefill tile; a longer chunk is several tiles, so that a call's shapes stay few.
TILE_ROWS = 64

# Element types of its pools.
DTYPES = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPool:
    """Keys and values of one site.

    k: [num_pages, page_size, num_kv_heads, head_dim]
    v: [num_pages, page_size, num_kv_heads, v_head_dim]
    dtype: element type. Arrays of 16-bit floats are held as uint16: XLA CPU scatters and gathers bfloat16 by way of an
      f32 copy of the whole pool, and a bit cast of the pool around them costs a copy too.
    """

    k: jax.Array
    v: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """Which rows of a call belong to which sequence, and where its pages are. All int32; the same for every site.

    page_table: [S, P] pages of each sequence in order; padded with page 0.
    first_row: [S] its first row in the call; its rows are consecutive.
    num_rows: [S] its rows in the call; 0 for padding.
    context: [S] positions cached once this call's rows are appended; the last row is at position context - 1.
    row_slot: [R] where each row's key and value go, page * page_size + offset; past the pool for padding.
    decode: [A] sequences with one row; padded with S - 1, which is always a padding sequence.
    tile_sequence, tile_offset: [B] sequences with several rows, cut into tiles of TILE_ROWS from row `offset` on.
    """

    page_table: Any
    first_row: Any
    num_rows: Any
    context: Any
    row_slot: Any
    decode: Any
    tile_sequence: Any
    tile_offset: Any


def make_pool(spec: AttentionSpec, *, num_pages: int, page_size: int, dtype: Any, device: Any) -> KVPool:
    """A zeroed pool on `device`."""
    shape = (num_pages, page_size, spec.num_kv_heads)
    dtype = jnp.dtype(dtype)
    held = jnp.uint16 if dtype.itemsize == 2 else dtype
    with jax.default_device(device):
        return KVPool(
            k=jnp.zeros((*shape, spec.head_dim), held),
            v=jnp.zeros((*shape, spec.v_head_dim), held),
            dtype=dtype.name,
        )


def page_bytes(spec: AttentionSpec, *, page_size: int, dtype: Any) -> int:
    """Bytes of one page of a pool."""
    return page_size * spec.num_kv_heads * (spec.head_dim + spec.v_head_dim) * jnp.dtype(dtype).itemsize


def paged_attention(
    pool: KVPool, q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout, site: AttentionSpec
) -> tuple[KVPool, jax.Array]:
    """Append this call's keys and values, then attend causally for every row: prefill chunks and decode rows together.

    Args:
      pool: the site's pool; donate it, so that it is updated in place.
      q: [R, num_heads, head_dim]; k: [R, num_kv_heads, head_dim]; v: [R, num_kv_heads, v_head_dim].
      layout: the same R rows.
      site: scale, window and soft cap.
    Returns:
      the pool, and [R, num_heads, v_head_dim] in q's dtype; rows of no sequence are 0.
    """
    rows = {"k": k, "v": v}
    pages = {name: _append(getattr(pool, name), _held(new, pool), layout.row_slot) for name, new in rows.items()}
    pool = dataclasses.replace(pool, **pages)
    out = jnp.zeros((q.shape[0], site.num_heads, site.v_head_dim), q.dtype)
    if layout.decode.shape[0]:
        out = _decode_rows(pool, q, layout, site, out)
    if layout.tile_sequence.shape[0]:
        out = _prefill_tiles(pool, q, layout, site, out)
    return pool, out


def _held(rows: jax.Array, pool: KVPool) -> jax.Array:
    """Rows in the pool's dtype, as the pool holds them."""
    return jax.lax.bitcast_convert_type(rows.astype(pool.dtype), pool.k.dtype)


def _append(pages: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat.at[slots].set(rows, mode="drop").reshape(pages.shape)


def _decode_rows(pool: KVPool, q: jax.Array, layout: AttentionLayout, site: AttentionSpec, out: jax.Array) -> jax.Array:
    first = layout.first_row[layout.decode]  # [A]
    context = layout.context[layout.decode]
    attend = jax.vmap(_attend, in_axes=(0, 0, 0, 0, None))
    keys, values = _gather(pool, layout.page_table[layout.decode])  # [A, C, kv_heads, dim]
    rows = attend(q[first][:, None], keys, values, (context - 1)[:, None], site)[:, 0]
    target = jnp.where(layout.num_rows[layout.decode] == 1, first, q.shape[0])
    return out.at[target].set(rows.astype(out.dtype), mode="drop")


def _prefill_tiles(
    pool: KVPool, q: jax.Array, layout: AttentionLayout, site: AttentionSpec, out: jax.Array
) -> jax.Array:
    def tile(step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sequence, offset = step
        num_rows, first = layout.num_rows[sequence], layout.first_row[sequence]
        row = offset + jnp.arange(TILE_ROWS)  # within the sequence's rows
        source = jnp.minimum(first + row, q.shape[0] - 1)
        keys, values = _gather(pool, layout.page_table[sequence])
        positions = layout.context[sequence] - num_rows + row
        rows = _attend(q[source], keys, values, positions, site)
        return rows, jnp.where(row < num_rows, source, q.shape[0])

    rows, target = jax.lax.map(tile, (layout.tile_sequence, layout.tile_offset))
    rows = rows.reshape(-1, *rows.shape[2:])
    return out.at[target.reshape(-1)].set(rows.astype(out.dtype), mode="drop")


def _gather(pool: KVPool, page_table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [..., P * page_size, kv_heads, dim] of page tables [..., P]."""

    def of(pages: jax.Array) -> jax.Array:
        found = jax.lax.bitcast_convert_type(pages[page_table], jnp.dtype(pool.dtype))
        axis = page_table.ndim
        return found.reshape(*found.shape[: axis - 1], -1, *found.shape[axis + 1 :])

    return of(pool.k), of(pool.v)


def _attend(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, site: AttentionSpec) -> jax.Array:
    """[Q, heads, v_dim] f32 of q [Q, heads, dim] at `positions` [Q] over keys, values [C, kv_heads, dim] from 0 on."""
    group = site.num_heads // site.num_kv_heads
    q = q.reshape(q.shape[0], site.num_kv_heads, group, site.head_dim).astype(jnp.float32)
    scores = site.scale * jnp.einsum("qhgd,chd->hgqc", q, keys.astype(jnp.float32))
    if site.softcap is not None:
        scores = site.softcap * jnp.tanh(scores / site.softcap)
    distance = positions[:, None] - jnp.arange(keys.shape[0])[None, :]  # [Q, C]
    visible = distance >= 0
    if site.window is not None:
        visible &= distance < site.window
    # A padding row sees nothing; the floor keeps its weights finite.
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    total = jnp.maximum(weights.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    out = jnp.einsum("hgqc,chd->qhgd", weights, values.astype(jnp.float32))
    out = out / jnp.transpose(total, (2, 0, 1))[..., None]
    return out.reshape(out.shape[0], site.num_heads, site.v_head_dim)


def slots_of(pages: np.ndarray, start: int, length: int, page_size: int) -> np.ndarray:
    """[length] slots of positions start .. start+length-1 of a sequence with page table `pages`."""
    positions = np.arange(start, start + length)
    return pages[positions // page_size] * page_size + positions % page_size
