"""A process that serves tier 2 to an engine elsewhere: pools and kernels of the sites that its handshake describes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import numpy as np

from hetero_jax.attention_layout import AttentionLayout
from hetero_jax.attention_tier import AttentionTier
from hetero_jax.described_site import read_description
from hetero_jax.endpoint import split_address, worker_tls
from hetero_jax.errors import ConfigError
from hetero_jax.wire import WIRE_DTYPES, from_wire, to_wire
from transport import Attend, Handler, Hello, Layout, Release, Result, WorkerServer
from transport.errors import RefusedError

_LAYOUT = tuple(field.name for field in fields(AttentionLayout))


class TierHandler(Handler):
    """Serves an `AttentionTier` that each session's Hello describes. The engine numbers the pages.

    Args:
      kv_cache_bytes: memory of all pools; a session takes as much of it as it can use.
    """

    def __init__(self, *, kv_cache_bytes: int) -> None:
        self._kv_cache_bytes = kv_cache_bytes
        self._tier: AttentionTier | None = None
        self._layouts: dict[int, Any] = {}  # by slot, where the sites of the tier need them

    def hello(self, hello: Hello) -> Hello:
        """As Handler."""
        self._tier, self._layouts = None, {}  # the old pools make room first
        try:
            self._tier = tier = self._make_tier(hello)
        except ConfigError as error:
            raise RefusedError(str(error)) from error
        return Hello(fingerprint=hello.fingerprint, generation=hello.generation, page_budget=tier.num_pages)

    def layout(self, layout: Layout) -> None:
        """As Handler. The layout has the fields of AttentionLayout."""
        assert self._tier is not None, "layouts follow a hello"
        self._layouts[layout.slot] = self._tier.place_layout(read_layout(layout.arrays))

    def attend(self, attend: Attend) -> Result:
        """As Handler."""
        assert self._tier is not None, "attends follow a hello"
        if not 0 <= attend.site < self._tier.num_sites:
            raise ConfigError(f"site {attend.site}; allowed: below {self._tier.num_sites}")
        rows_sent = [array for array in (attend.q, attend.k, attend.v) if array is not None]
        allowed = 1 if self._tier.shares_pool[attend.site] else 3
        if len(rows_sent) != allowed:
            what = "q alone, as an earlier site keeps k and v" if allowed == 1 else "q, k and v"
            raise ConfigError(f"{len(rows_sent)} arrays of rows for site {attend.site}; allowed: {what}")
        if attend.layout not in self._layouts:
            raise ConfigError(f"an attend with layout {attend.layout}; allowed: one that was sent before")
        began_ns = time.monotonic_ns()
        wired = [jax.device_put(array, self._tier.device) for array in rows_sent]
        dtype = wired[0].dtype.name
        if dtype not in WIRE_DTYPES:
            raise ConfigError(f"rows of {dtype}; allowed: {', '.join(WIRE_DTYPES)}")
        rows = from_wire(wired, "float32") if dtype == "int8" else wired
        out = self._tier.attend(attend.site, self._layouts[attend.layout], rows)
        (answer,) = to_wire(out, dtype)
        found = np.asarray(answer)
        return Result(request_id=attend.request_id, out=found, began_ns=began_ns, ended_ns=time.monotonic_ns())

    def release(self, release: Release) -> None:
        """As Handler: nothing, as the engine gives pages away again itself."""

    def stats(self) -> Mapping[str, int]:
        """As Handler: bytes of the pools."""
        return {"pool_bytes": 0 if self._tier is None else self._tier.pool_bytes}

    def _make_tier(self, hello: Hello) -> AttentionTier:
        sites = [read_description(site) for site in hello.sites]
        kinds = {(site.page_size, site.kv_cache_dtype) for site in sites}
        if len(kinds) != 1:
            raise ConfigError(f"page sizes and dtypes of the sites: {sorted(kinds)}; allowed: one, the same for all")
        ((page_size, dtype),) = kinds
        return AttentionTier(
            sites,
            {},
            kv_cache_bytes=self._kv_cache_bytes,
            page_size=page_size,
            dtype=dtype,
            device=jax.local_devices(backend="cpu")[-1],
            max_pages=max(hello.page_budget, 1),
        )


def read_layout(arrays: Mapping[str, np.ndarray]) -> AttentionLayout:
    """The layout in a Layout.

    Raises:
      ConfigError: an array is missing or is not int32.
    """
    for name in _LAYOUT:
        if name not in arrays or arrays[name].dtype != np.int32:
            raise ConfigError(f"a layout with {sorted(arrays)}; allowed: {', '.join(_LAYOUT)}, all int32")
    return AttentionLayout(**{name: arrays[name] for name in _LAYOUT})


def make_server(
    *,
    listen: str,
    kv_cache_bytes: int,
    secret: bytes | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> WorkerServer:
    """A worker's server, listening but not serving yet.

    Args:
      listen: HOST:PORT, the host in numbers; port 0: any free one.
      tls_cert, tls_key: PEM files; None: no TLS.
    Raises:
      ConfigError: no address, or a certificate without its key.
      TransportError: not loopback and no secret, or a secret that is too short.
      OSError: the address or a file cannot be used.
    """
    host, port = split_address(listen)
    handler = TierHandler(kv_cache_bytes=kv_cache_bytes)
    return WorkerServer(handler, host, port, secret=secret, tls=worker_tls(tls_cert, tls_key))
