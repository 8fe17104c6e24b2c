"""Paged attention by the native kernel: an XLA custom call on the CPU, in the speed class of its memory.

The pool's layout makes both passes stream. Keys lie dimension-major within a page, so that a vector register holds one
dimension of several keys and a score needs no sum across lanes; values lie token-major, so that a register holds
several dimensions of one value; a page of one KV head is contiguous.

    k: [num_pages, num_kv_heads, head_dim, page_size]
    v: [num_pages, num_kv_heads, page_size, v_head_dim]

`paged_attention` has the meaning of `hetero_jax.attention.paged_attention`, which is its oracle. A row's bits depend on
its own sequence alone: not on the other rows, the number of threads, or the page numbers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetero_jax.attention import AttentionLayout, KVPool
from partition import AttentionSpec

_TARGET = "hetero_paged_attention"
_PAGE_MULTIPLE = 16
_DTYPES = ("float32", "bfloat16")


def refusal(*, page_size: int, dtype: Any, device: Any) -> str | None:
    """Why the kernel cannot serve such a pool; None if it can."""
    if device.platform != "cpu":
        return f"the native kernel runs on the CPU, not on {device.platform}"
    if page_size % _PAGE_MULTIPLE:
        return f"page_size={page_size}; the native kernel takes multiples of {_PAGE_MULTIPLE}"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"kv_cache_dtype={jnp.dtype(dtype).name}; the native kernel takes {', '.join(_DTYPES)}"
    return _load()


@functools.cache
def _load() -> str | None:
    """Register the library's handler with XLA once; returns what is missing, if anything."""
    path = importlib.resources.files("hetero_jax") / "libhetero_attention.so"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library was not built when the package was installed ({error})"
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.hetero_paged_attention), platform="cpu")
    return None


def make_pool(spec: AttentionSpec, *, num_pages: int, page_size: int, dtype: Any, device: Any) -> KVPool:
    """A zeroed pool on `device`, in this module's layout."""
    dtype = jnp.dtype(dtype)
    with jax.default_device(device):
        return KVPool(
            k=jnp.zeros((num_pages, spec.num_kv_heads, spec.head_dim, page_size), dtype),
            v=jnp.zeros((num_pages, spec.num_kv_heads, page_size, spec.v_head_dim), dtype),
            dtype=dtype.name,
        )


def needed_layout(layout: AttentionLayout) -> AttentionLayout:
    """The layout without what only the jax.numpy form reads, so that fewer shapes are compiled."""
    none = np.zeros(0, np.int32)
    return dataclasses.replace(layout, decode=none, tile_sequence=none, tile_offset=none)


def paged_attention(
    pool: KVPool, q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout, site: AttentionSpec
) -> tuple[KVPool, jax.Array]:
    """Append this call's keys and values, then attend causally for every row; see the jax.numpy form.

    Raises:
      ValueError: shapes or dtypes that do not fit each other; from the custom call itself
        (`jax.errors.JaxRuntimeError`), page tables or lengths that do not fit the pool.
      RuntimeError: the native library is not there; `refusal` tells beforehand.
    """
    missing = _load()
    if missing is not None:
        raise RuntimeError(missing)
    _check(pool, q, k, v, layout, site)
    results = (
        jax.ShapeDtypeStruct(pool.k.shape, pool.k.dtype),
        jax.ShapeDtypeStruct(pool.v.shape, pool.v.dtype),
        jax.ShapeDtypeStruct((q.shape[0], site.num_heads, site.v_head_dim), q.dtype),
    )
    call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases={0: 0, 1: 1})
    tables = (layout.page_table, layout.first_row, layout.num_rows, layout.context, layout.row_slot)
    scalars = {"scale": np.float32(site.scale), "softcap": np.float32(site.softcap or 0.0)}
    keys, values, out = call(pool.k, pool.v, q, k, v, *tables, **scalars, window=np.int64(site.window or 0))
    return dataclasses.replace(pool, k=keys, v=values), out


def _check(
    pool: KVPool, q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout, site: AttentionSpec
) -> None:
    rows, heads = q.shape[0], site.num_kv_heads
    pages, _, _, page_size = pool.k.shape
    sequences = layout.page_table.shape[0]
    expected = {
        "q": (q.shape, (rows, site.num_heads, site.head_dim)),
        "k": (k.shape, (rows, heads, site.head_dim)),
        "v": (v.shape, (rows, heads, site.v_head_dim)),
        "pool.k": (pool.k.shape, (pages, heads, site.head_dim, page_size)),
        "pool.v": (pool.v.shape, (pages, heads, page_size, site.v_head_dim)),
        "row_slot": (layout.row_slot.shape, (rows,)),
        **{name: (getattr(layout, name).shape, (sequences,)) for name in ("first_row", "num_rows", "context")},
    }
    for name, (seen, allowed) in expected.items():
        if tuple(seen) != allowed:
            raise ValueError(f"{name} has shape {tuple(seen)}; allowed: {allowed}")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in _DTYPES:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; allowed: all float32 or all bfloat16")
