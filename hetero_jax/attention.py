"""Paged causal softmax attention in plain jax.numpy: the oracle of the native kernel; readable, any backend, slow."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hetero_jax import paged_rows
from hetero_jax.attention_layout import AttentionLayout
from partition import AttentionSpec

# Element types of its pools.
DTYPES = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPool:
    """Keys and values of one site.

    k: [num_pages, page_size, num_kv_heads, head_dim]
    v: [num_pages, page_size, num_kv_heads, v_head_dim]
    dtype: element type; see `paged_rows.held_dtype` for what the arrays have.
    """

    k: jax.Array
    v: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})


def make_pool(spec: AttentionSpec, *, num_pages: int, page_size: int, dtype: Any, device: Any) -> KVPool:
    """A zeroed pool on `device`."""
    shape = (num_pages, page_size, spec.num_kv_heads)
    dtype = jnp.dtype(dtype)
    held = paged_rows.held_dtype(dtype)
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
    pool: KVPool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: AttentionLayout,
    site: AttentionSpec,
    *,
    sinks: jax.Array | None = None,
) -> tuple[KVPool, jax.Array]:
    """Append this call's keys and values, then attend causally for every row: prefill chunks and decode rows together.

    Args:
      pool: the site's pool; donate it, so that it is updated in place.
      q: [R, num_heads, head_dim]; k: [R, num_kv_heads, head_dim]; v: [R, num_kv_heads, v_head_dim]. Where the pool has
        the rows already, k and v have none.
      layout: the same R rows; `row_slot` as many as k and v have.
      site: scale, window, soft cap and linear biases.
      sinks: [num_heads] a score of each head that takes part in the sum and brings no value. None: none does.
    Returns:
      the pool, and [R, num_heads, v_head_dim] in q's dtype; rows of no sequence are 0.
    """
    rows = {"k": k, "v": v}
    pages = {
        name: paged_rows.append(getattr(pool, name), new, layout.row_slot, pool.dtype) for name, new in rows.items()
    }
    pool = dataclasses.replace(pool, **pages)

    def attend(source: jax.Array, page_table: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        keys, values = (paged_rows.gather(array, page_table, pool.dtype) for array in (pool.k, pool.v))
        return (_attend(q[source], keys, values, positions, site, sinks).astype(q.dtype),)

    (out,) = paged_rows.over_sequences(layout, q.shape[0], attend)
    return pool, out


def _attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, site: AttentionSpec, sinks: jax.Array | None
) -> jax.Array:
    """[Q, heads, v_dim] f32 of q [Q, heads, dim] at `positions` [Q] over keys, values [C, kv_heads, dim] from 0 on."""
    group = site.num_heads // site.num_kv_heads
    q = q.reshape(q.shape[0], site.num_kv_heads, group, site.head_dim).astype(jnp.float32)
    scores = site.scale * jnp.einsum("qhgd,chd->hgqc", q, keys.astype(jnp.float32))
    if site.softcap is not None:
        scores = site.softcap * jnp.tanh(scores / site.softcap)
    distance = positions[:, None] - jnp.arange(keys.shape[0])[None, :]  # [Q, C]
    if site.alibi_slopes is not None:
        scores -= jnp.array(site.alibi_slopes).reshape(site.num_kv_heads, group, 1, 1) * distance
    visible = distance >= 0
    if site.window is not None:
        visible &= distance < site.window
    # A padding row sees nothing; the floor keeps its weights finite.
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(site.num_kv_heads, group, 1, 1)
        top = jnp.maximum(top, sink)
    weights = jnp.exp(scores - top)
    total = jnp.maximum(weights.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    if sinks is not None:
        total += jnp.exp(sink - top)[..., 0]
    out = jnp.einsum("hgqc,chd->qhgd", weights, values.astype(jnp.float32))
    out = out / jnp.transpose(total, (2, 0, 1))[..., None]
    return out.reshape(out.shape[0], site.num_heads, site.v_head_dim)
