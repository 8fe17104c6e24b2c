"""Tier 2 on another machine: the interface of `AttentionTier` over a connection to a worker."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import jax
import numpy as np

from hetero_jax.attention_layout import AttentionLayout
from hetero_jax.described_site import describe, fingerprint
from hetero_jax.devices import start_copy
from hetero_jax.endpoint import split_address
from hetero_jax.errors import WorkerError
from partition import PlannedSite, Value
from transport import Hello, Result, TransportError, WorkerClient, connect

T = TypeVar("T")


class PendingRows:
    """The answer of a call that is on its way."""

    def __init__(self, rows: Callable[[], np.ndarray]) -> None:
        """rows: waits for [R, heads, v_head_dim]; raises WorkerError where the worker failed."""
        self.rows = rows

    def block_until_ready(self) -> PendingRows:
        """What `jax.block_until_ready` asks for."""
        self.rows()
        return self


class RemoteTier:
    """Serves `attend` by a worker; rows travel in their own dtype.

    Args:
      sites: of the plan.
      weights: arrays of the weights that sites read.
      address: HOST:PORT of the worker.
      secret: shared with it; None for loopback.
      max_pages: pages that can be used at most; `num_pages` is what the worker grants.
      page_size, dtype: of the pools.
      device: of this process, where rows are before they leave and when they are back.
    Raises:
      ConfigError: a site that workers do not serve.
      WorkerError: the worker is not there, or refuses.
    """

    def __init__(
        self,
        sites: Sequence[PlannedSite],
        weights: Mapping[Value, jax.Array],
        *,
        address: str,
        secret: bytes | None,
        max_pages: int,
        page_size: int,
        dtype: Any,
        device: Any,
    ) -> None:
        self.device, self.place = device, f"worker {address}"
        self._out_shapes = [(site.spec.num_heads, site.spec.v_head_dim) for site in sites if site.spec is not None]
        descriptions = describe(sites, weights, page_size=page_size, dtype=dtype)
        hello = Hello(
            fingerprint=fingerprint(descriptions),
            generation=time.time_ns(),
            page_budget=max_pages,
            sites=descriptions,
        )
        host, port = split_address(address)
        self._client: WorkerClient = self._guard(lambda: connect(host, port, hello, secret=secret))
        weakref.finalize(self, self._client.close)  # its threads would keep it for ever
        self.num_pages = self._client.welcome.page_budget
        self.pool_bytes = cast("int", self._guard(lambda: self._client.stats().result()).values["pool_bytes"])

    def place_layout(self, layout: AttentionLayout) -> Mapping[str, np.ndarray]:
        """What each Attend carries of the layout."""
        return {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}

    def begin(self, arrays: tuple[jax.Array, ...]) -> None:
        """Start to bring what travels to the host."""
        start_copy(arrays, self.device)

    def attend(self, site: int, layouts: Mapping[str, np.ndarray], inputs: Sequence[jax.Array]) -> PendingRows:
        """Send q, k and v of the rows on their way; `fetch` waits for the answer."""
        q, k, v = (np.asarray(array) for array in inputs)
        future = self._guard(lambda: self._client.attend(site=site, layout=layouts, q=q, k=k, v=v))
        shape = (len(q), *self._out_shapes[site])
        return PendingRows(lambda: self._rows(future, shape, q.dtype))

    def fetch(self, pending: PendingRows) -> tuple[jax.Array, ...]:
        """[R, heads, v_head_dim] on this tier's device."""
        return (jax.device_put(pending.rows(), self.device),)

    def _rows(self, future: Future[Result], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        out = self._guard(lambda: future.result().out)
        if out.shape != shape or out.dtype != dtype:
            raise WorkerError(f"{self.place} answered {out.dtype}{out.shape}; allowed: {dtype}{shape}")
        return out

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except TransportError as error:
            raise WorkerError(f"{self.place}: {error}") from error
