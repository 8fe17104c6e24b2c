"""Tier 2: the paged KV pools and the jitted attention of every site, on one device of this process."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from hetero_jax import attention, native_attention
from hetero_jax.attention import AttentionLayout, KVPool
from hetero_jax.devices import land, start_copy
from partition import AttentionSpec


class AttentionTier:
    """Serves `attend` for each site; the pools are donated to the call and replaced by its result."""

    def __init__(
        self, specs: Sequence[AttentionSpec], *, num_pages: int, page_size: int, dtype: Any, device: Any
    ) -> None:
        self.device = device
        self._specs = tuple(specs)
        self._is_native = _use_native(page_size=page_size, dtype=dtype, device=device)
        kernel = native_attention if self._is_native else attention
        self._pools: list[KVPool] = [
            kernel.make_pool(spec, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device)
            for spec in specs
        ]
        self._calls = {
            spec: jax.jit(functools.partial(kernel.paged_attention, site=spec), donate_argnums=0) for spec in set(specs)
        }

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(array.nbytes for pool in self._pools for array in (pool.k, pool.v))

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


def _use_native(*, page_size: int, dtype: Any, device: Any) -> bool:
    """Whether the native kernel serves these pools; on a CPU without it, say so once."""
    why = native_attention.refusal(page_size=page_size, dtype=dtype, device=device)
    if why is not None and device.platform == "cpu":
        warnings.warn(f"attention runs in plain jax.numpy, about ten times slower: {why}", stacklevel=4)
    return why is None
