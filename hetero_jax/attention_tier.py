"""Tier 2: the paged KV pools and the jitted attention of every site, on one device of this process."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from hetero_jax import attention, native_attention
from hetero_jax.attention import AttentionLayout
from hetero_jax.devices import land, start_copy
from hetero_jax.errors import ConfigError
from partition import AttentionSpec


class AttentionTier:
    """Serves `attend` for each site; the pools are donated to the call and replaced by its result.

    Args:
      specs: of the sites.
      kv_cache_bytes: memory of all pools; `num_pages` is as many as it holds.
      page_size: token positions in a page.
      dtype: element type of the pools.
      device: where they are.
    Raises:
      ConfigError: not one page fits, or what serves this device has no such dtype.
    """

    def __init__(
        self, specs: Sequence[AttentionSpec], *, kv_cache_bytes: int, page_size: int, dtype: Any, device: Any
    ) -> None:
        self.device = device
        self._specs = tuple(specs)
        kernel = _kernel(dtype=dtype, device=device)
        self._is_native = kernel is native_attention
        page_bytes = sum(kernel.page_bytes(spec, page_size=page_size, dtype=dtype) for spec in specs)
        if kv_cache_bytes < page_bytes:
            raise ConfigError(
                f"kv_cache_bytes={kv_cache_bytes} holds no page: one page of {page_size} tokens takes "
                f"{page_bytes} bytes over {len(specs)} sites"
            )
        self.num_pages = kv_cache_bytes // page_bytes
        self._pools: list[Any] = [
            kernel.make_pool(spec, num_pages=self.num_pages, page_size=page_size, dtype=dtype, device=device)
            for spec in specs
        ]
        self._calls = {
            spec: jax.jit(functools.partial(kernel.paged_attention, site=spec), donate_argnums=0) for spec in set(specs)
        }

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(array.nbytes for array in jax.tree.leaves(self._pools))

    def place_layout(self, layout: AttentionLayout) -> AttentionLayout:
        """The layout on this tier's device: once per microbatch, not once per site."""
        needed = native_attention.needed_layout(layout) if self._is_native else layout
        return jax.device_put(needed, self.device)

    def begin(self, arrays: tuple[jax.Array, ...]) -> None:
        """Start to move q, k and v here."""
        start_copy(arrays, self.device)

    def attend(self, site: int, layout: AttentionLayout, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Append k and v to the site's pool and attend: [R, num_heads, v_head_dim] on this tier's device."""
        q, k, v = (land(array, self.device) for array in (q, k, v))
        self._pools[site], out = self._calls[self._specs[site]](self._pools[site], q, k, v, layout)
        return out


def _kernel(*, dtype: Any, device: Any) -> ModuleType:
    """What serves such pools: the native kernel, or, with a warning on the CPU, the jax.numpy form."""
    why = native_attention.refusal(dtype=dtype, device=device)
    if why is None:
        return native_attention
    if jnp.dtype(dtype).name not in attention.DTYPES:
        raise ConfigError(f"kv_cache_dtype={jnp.dtype(dtype).name} needs the native kernel: {why}")
    if device.platform == "cpu":
        warnings.warn(f"attention runs in plain jax.numpy, about ten times slower: {why}", stacklevel=4)
    return attention
