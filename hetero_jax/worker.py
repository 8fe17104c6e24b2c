"""A process that serves tier 2 to an engine elsewhere: pools and kernels of the sites that its handshake describes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import numpy as np

from hetero_jax.attention_layout import GroupedLayout
from hetero_jax.attention_tier import AttentionTier
from hetero_jax.described_site import DescribedSite, read_descriptions
from hetero_jax.endpoint import split_address, worker_tls
from hetero_jax.errors import ConfigError
from hetero_jax.exported_site import ExportedSite
from hetero_jax.wire import on_host
from transport import (
    MAX_PAGES_BYTES,
    Attend,
    FetchPages,
    Handler,
    Hello,
    Layout,
    Pages,
    Query,
    Release,
    Result,
    StorePages,
    WorkerServer,
)
from transport.errors import RefusedError

_LAYOUT = tuple(field.name for field in fields(GroupedLayout))


class _Begun(NamedTuple):
    """q of a call, and what was made of it before k and v came, or why nothing could be, and how long that took."""

    call: Attend | Query
    attended: Any = None
    failure: Exception | None = None
    busy_ns: int = 0


class TierHandler(Handler):
    """Serves an `AttentionTier` that each session's Hello describes. The engine numbers the pages.

    Args:
      kv_cache_bytes: memory of all pools; a session takes as much of it as it can use.
      allow_exported_sites: run programs of the engine for attention that has no kernel; only where engines prove
        themselves by a secret.
    """

    def __init__(self, *, kv_cache_bytes: int, allow_exported_sites: bool = False) -> None:
        self._kv_cache_bytes, self._allow_exported_sites = kv_cache_bytes, allow_exported_sites
        self._tier: AttentionTier | None = None
        self._sites: list[DescribedSite | ExportedSite] = []
        self._layouts: dict[int, Any] = {}  # by slot, where the sites of the tier need them
        self._begun: _Begun | None = None  # with a Query, whose Attend is to come

    def hello(self, hello: Hello) -> Hello:
        """As Handler."""
        self._tier, self._layouts, self._begun = None, {}, None  # the old pools make room first
        try:
            self._tier = tier = self._make_tier(hello)
        except ConfigError as error:
            raise RefusedError(str(error)) from error
        return Hello(fingerprint=hello.fingerprint, generation=hello.generation, page_budget=tier.num_pages)

    def layout(self, layout: Layout) -> None:
        """As Handler. The layout has the fields of GroupedLayout."""
        assert self._tier is not None, "layouts follow a hello"
        self._layouts[layout.slot] = self._tier.place_layout(read_layout(layout.arrays, self._tier.num_groups))

    def query(self, query: Query) -> None:
        """As Handler. What fails here fails the Attend, which the engine awaits."""
        began_ns, attended, failure = time.monotonic_ns(), None, None
        try:
            attended = self._attend_behind(query)
        except Exception as error:
            failure = error
        self._begun = _Begun(query, attended, failure, time.monotonic_ns() - began_ns)

    def attend(self, attend: Attend) -> Result:
        """As Handler."""
        tier, layouts = self._called(attend)
        begun = self._take_begun(attend)
        site = self._sites[attend.site]
        sent = [array for array in (begun.call.q, attend.k, attend.v) if array is not None]
        arrays, dtype = site.unpack(sent, shares_pool=tier.shares_pool[attend.site])
        began_ns = time.monotonic_ns() - begun.busy_ns
        out = site.pack(on_host(tier.attend(attend.site, layouts, arrays, dtype, begun.attended)))
        return Result(request_id=attend.request_id, out=out, began_ns=began_ns, ended_ns=time.monotonic_ns())

    def _attend_behind(self, query: Query) -> Any:
        tier, layouts = self._called(query)
        site = self._sites[query.site]
        if not isinstance(site, DescribedSite) or tier.shares_pool[query.site]:
            raise ConfigError(f"q of site {query.site} alone; allowed: of sites that keep k and v, and have a kernel")
        (q,), dtype = site.unpack([query.q], shares_pool=True)
        return tier.attend_behind(query.site, layouts, q, dtype)

    def _called(self, call: Attend | Query) -> tuple[AttentionTier, Any]:
        """The tier, and the call's layouts there."""
        assert self._tier is not None, "calls follow a hello"
        if not 0 <= call.site < self._tier.num_sites:
            raise ConfigError(f"site {call.site}; allowed: below {self._tier.num_sites}")
        if call.layout not in self._layouts:
            raise ConfigError(f"a call with layout {call.layout}; allowed: one that was sent before")
        return self._tier, self._layouts[call.layout]

    def _take_begun(self, attend: Attend) -> _Begun:
        """What the Query before this Attend has begun; nothing, where q came with it."""
        begun, self._begun = self._begun or _Begun(attend), None
        if begun.failure is not None:
            raise begun.failure
        queried, call = begun.call, (attend.site, attend.layout)
        if (queried.site, queried.layout) != call or (queried is attend) == (attend.q is None):
            raise ConfigError(f"an attend without q, or with one that came; allowed: the query of {call} before, or q")
        return begun

    def release(self, release: Release) -> None:
        """As Handler: nothing, as the engine gives pages away again itself."""

    def fetch_pages(self, fetch: FetchPages) -> Pages:
        """As Handler."""
        assert self._tier is not None, "pages follow a hello"
        page_bytes = self._tier.pool_bytes // self._tier.num_pages
        if (size := fetch.pages.size * page_bytes) > MAX_PAGES_BYTES:
            raise ConfigError(f"{fetch.pages.size} pages of {size} bytes; allowed: at most {MAX_PAGES_BYTES} bytes")
        return Pages(request_id=fetch.request_id, arrays=self._tier.read_pages(fetch.pages))

    def store_pages(self, store: StorePages) -> None:
        """As Handler."""
        assert self._tier is not None, "pages follow a hello"
        self._tier.write_pages(store.pages, store.arrays)

    def stats(self) -> Mapping[str, int | str]:
        """As Handler: bytes of the pools, and the format of a page."""
        if self._tier is None:
            return {"pool_bytes": 0, "page_format": ""}
        return {"pool_bytes": self._tier.pool_bytes, "page_format": self._tier.page_format}

    def _make_tier(self, hello: Hello) -> AttentionTier:
        allow = self._allow_exported_sites
        self._sites = sites = read_descriptions(hello.sites, hello.artifacts, allow_exported_sites=allow)
        kinds = {(site.page_size, site.kv_cache_dtype) for site in sites}
        if len(kinds) != 1:
            raise ConfigError(f"page sizes and dtypes of the sites: {sorted(kinds)}; allowed: one, the same for all")
        ((page_size, dtype),) = kinds
        shapes = {site.pages.pool: site.page_shape for site in sites}
        for site in sites:
            if site.page_shape != (shape := shapes[site.pages.pool]):
                raise ConfigError(f"pages {site.page_shape} and {shape} in one pool; allowed: of one shape")
        return AttentionTier(
            sites,
            {},
            pages=[site.pages for site in sites],
            kv_cache_bytes=self._kv_cache_bytes,
            page_size=page_size,
            dtype=dtype,
            device=jax.local_devices(backend="cpu")[-1],
            max_pages=max(hello.page_budget, 1),
        )


def read_layout(arrays: Mapping[str, np.ndarray], num_groups: int) -> GroupedLayout:
    """The layout in a Layout.

    Raises:
      ConfigError: an array is missing or is not int32, or page tables or slots are not those of so many groups.
    """
    for name in _LAYOUT:
        if name not in arrays or arrays[name].dtype != np.int32:
            raise ConfigError(f"a layout with {sorted(arrays)}; allowed: {', '.join(_LAYOUT)}, all int32")
    layout = GroupedLayout(**{name: arrays[name] for name in _LAYOUT})
    tables, slots = list(layout.page_tables.shape), list(layout.row_slots.shape)
    if (len(tables), len(slots), tables[:1], slots[:1]) != (3, 2, [num_groups], [num_groups]):
        allowed = f"[{num_groups}, sequences, pages] and [{num_groups}, rows]"
        raise ConfigError(f"page tables {tables} and slots {slots}; allowed: {allowed}")
    return layout


def make_server(
    *,
    listen: str,
    kv_cache_bytes: int,
    secret: bytes | None = None,
    allow_exported_sites: bool = False,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> WorkerServer:
    """A worker's server, listening but not serving yet.

    Args:
      listen: HOST:PORT, the host in numbers; port 0: any free one.
      allow_exported_sites: as of TierHandler.
      tls_cert, tls_key: PEM files; None: no TLS.
    Raises:
      ConfigError: no address, a certificate without its key, or exported sites without a secret.
      TransportError: not loopback and no secret, or a secret that is too short.
      OSError: the address or a file cannot be used.
    """
    host, port = split_address(listen)
    if allow_exported_sites and secret is None:
        raise ConfigError("allow_exported_sites without a secret; allowed: with one, which proves who sends programs")
    handler = TierHandler(kv_cache_bytes=kv_cache_bytes, allow_exported_sites=allow_exported_sites)
    return WorkerServer(handler, host, port, secret=secret, tls=worker_tls(tls_cert, tls_key))
