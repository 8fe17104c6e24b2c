"""Pages of pools as raw bytes: how keys and values leave one worker for another with every bit.

All kinds of pools are arrays whose first axis counts pages. XLA CPU moves elements of bfloat16 by way of float32, over
the whole array; so here they are integers of the same width, and a page costs what a page has.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hetero_jax.errors import ConfigError


def page_format(pools: Sequence[Any]) -> str:
    """What two tiers must have in common for the bytes of a page to mean the same: kinds of pools, dtypes, shapes."""
    kinds = [(str(jax.tree.structure(pool)), [_page_kind(array) for array in jax.tree.leaves(pool)]) for pool in pools]
    return hashlib.sha256(repr(kinds).encode()).hexdigest()


def read_pages(pools: Sequence[Any], pages: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pages [n] of the pools: [n, bytes] uint8 of each of their arrays.

    Raises:
      ConfigError: there are no such pages.
    """
    arrays = jax.tree.leaves(pools)
    _check_numbers(arrays, pages)
    found = [np.empty((len(pages), _page_bytes(array)), np.uint8) for array in arrays]
    for array, rows in zip(arrays, found, strict=True):
        for row, page in zip(rows, pages, strict=True):
            row[:] = np.asarray(_read(array, jax.device_put(np.int32(page), array.device))).view(np.uint8)
    return tuple(found)


def write_pages(pools: Sequence[Any], pages: np.ndarray, contents: Sequence[np.ndarray]) -> list[Any]:
    """The pools with pages [n] replaced by what `read_pages` gave elsewhere; their arrays are donated.

    Raises:
      ConfigError: there are no such pages, or the contents are of other pools.
    """
    arrays, structure = jax.tree.flatten(list(pools))
    _check_numbers(arrays, pages)
    allowed = [((len(pages), _page_bytes(array)), "uint8") for array in arrays]
    if (seen := [(rows.shape, rows.dtype.name) for rows in contents]) != allowed:
        raise ConfigError(f"contents of pages {seen}; allowed for these pools: {allowed}")
    written = []
    for array, rows in zip(arrays, contents, strict=True):
        for row, page in zip(rows, pages, strict=True):
            bits = jax.device_put(row.view(_bits(array)), array.device)
            array = _write(array, bits, np.int32(page))
        written.append(array)
    return jax.tree.unflatten(structure, written)


def _check_numbers(arrays: Sequence[jax.Array], pages: np.ndarray) -> None:
    if pages.ndim != 1 or pages.dtype != np.int64:
        raise ConfigError(f"page numbers {pages.dtype}{pages.shape}; allowed: int64 with one axis")
    num_pages = len(arrays[0])
    for page in pages[(pages < 0) | (pages >= num_pages)]:
        raise ConfigError(f"page {page}; allowed: 0 to {num_pages - 1}")


def _page_kind(array: jax.Array) -> tuple[str, tuple[int, ...]]:
    return array.dtype.name, array.shape[1:]


def _page_bytes(array: jax.Array) -> int:
    return array.nbytes // len(array)


def _bits(array: jax.Array) -> np.dtype[Any]:
    """What stands for the array's elements; flags stand for themselves, as they have no other form in XLA."""
    return array.dtype if array.dtype == np.bool_ else np.dtype(f"uint{8 * array.dtype.itemsize}")


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


@jax.jit
def _read(array: jax.Array, page: jax.Array) -> jax.Array:
    """[elements] as integers."""
    whole = _cast(array, _bits(array))
    return jax.lax.dynamic_index_in_dim(whole, page, keepdims=False).reshape(-1)


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, bits: jax.Array, page: jax.Array) -> jax.Array:
    whole = _cast(array, bits.dtype)
    whole = jax.lax.dynamic_update_index_in_dim(whole, bits.reshape(array.shape[1:]), page, 0)
    return _cast(whole, array.dtype)
