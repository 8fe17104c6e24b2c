"""Attention that no kernel knows: a site's own traced subgraph, jitted over the gathered pages of each sequence.

Exact for whatever the model computes (sigmoid attention, biases by distance, several keys), and slower than the
kernels: every row reads its sequence's whole context through XLA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hetero_jax import paged_rows
from hetero_jax.attention_layout import AttentionLayout
from partition import PlannedSite, Port

# One array [num_pages, page_size, *inner] per value that enters on the key side, in the order of the site's inputs.
TracedPool = tuple[jax.Array, ...]


def make_pool(site: PlannedSite, *, num_pages: int, page_size: int, dtype: Any, device: Any) -> TracedPool:
    """A zeroed pool on `device`; values of a float type are held as `dtype`, others as they are."""
    with jax.default_device(device):
        return tuple(
            jnp.zeros((num_pages, page_size, *port.layout.inner), paged_rows.held_dtype(_cached_dtype(port, dtype)))
            for port in site.cached
        )


def page_bytes(site: PlannedSite, *, page_size: int, dtype: Any) -> int:
    """Bytes of one page of a pool."""
    return page_size * sum(
        math.prod(port.layout.inner) * jnp.dtype(_cached_dtype(port, dtype)).itemsize for port in site.cached
    )


def paged_attention(
    pool: TracedPool,
    inputs: Sequence[jax.Array],
    layout: AttentionLayout,
    weights: Sequence[jax.Array],
    *,
    site: PlannedSite,
    dtype: Any,
) -> tuple[TracedPool, tuple[jax.Array, ...]]:
    """Append this call's rows of what is cached, then run the site for every row.

    Args:
      pool: the site's pool; donate it, so that it is updated in place.
      inputs: [R, *inner] of each of the site's inputs, or of those alone that are not cached: the pool has the others.
      layout: the same R rows.
      weights: of `site.weights`.
      site: what to compute. dtype: as in `make_pool`.
    Returns:
      the pool, and [R, *inner] of each of the site's outputs; rows of no sequence are 0.
    """
    dtypes = [_cached_dtype(port, dtype) for port in site.cached]
    queries = list(inputs)
    if len(inputs) == len(site.inputs):
        cached = [array for port, array in zip(site.inputs, inputs, strict=True) if port.is_cached]
        queries = [array for port, array in zip(site.inputs, inputs, strict=True) if not port.is_cached]
        pool = tuple(
            paged_rows.append(pages, rows, layout.row_slot, each)
            for pages, rows, each in zip(pool, cached, dtypes, strict=True)
        )

    def attend(source: jax.Array, page_table: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        keys = jnp.arange(page_table.shape[0] * pool[0].shape[1])
        found = (paged_rows.gather(pages, page_table, each) for pages, each in zip(pool, dtypes, strict=True))
        # What other sequences left in the pages has no weight, but 0 times an infinity is none.
        known = iter([jnp.where(_along(keys <= positions.max(), rows), rows, 0) for rows in found])
        asked = iter(queries)
        operands = [
            next(known).astype(port.value.dtype) if port.is_cached else next(asked)[source] for port in site.inputs
        ]
        return site.attend(operands, positions, keys, weights)

    return pool, paged_rows.over_sequences(layout, inputs[0].shape[0], attend)


def _cached_dtype(port: Port, dtype: Any) -> Any:
    return dtype if jnp.issubdtype(port.value.dtype, jnp.floating) else port.value.dtype


def _along(flags: jax.Array, rows: jax.Array) -> jax.Array:
    return flags.reshape(-1, *(1,) * (rows.ndim - 1))
