"""Tier 2 on other machines: the interface of `AttentionTier` over connections to workers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import ssl
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np

from hetero_jax.attention_layout import AttentionLayout
from hetero_jax.described_site import describe, fingerprint
from hetero_jax.devices import start_copy
from hetero_jax.endpoint import split_address
from hetero_jax.errors import WorkerError
from hetero_jax.rows import select
from hetero_jax.wire import from_wire, to_wire, wired_shape
from partition import PlannedSite, Value
from transport import MAX_LAYOUTS, Answer, Hello, Result, TransportError, WorkerClient, connect

T = TypeVar("T")


class Leaving(NamedTuple):
    """Rows that are about to travel, and the dtype that they had before."""

    wired: jax.Array
    dtype: Any


class PendingRows:
    """The answer of a call that is on its way. dtype: of the rows once they are here."""

    def __init__(self, rows: Callable[[], np.ndarray], dtype: Any) -> None:
        """rows: waits for [R, heads, v_head_dim] as wired; raises WorkerError where the worker failed."""
        self.rows, self.dtype = functools.cache(rows), dtype

    def block_until_ready(self) -> PendingRows:
        """What `jax.block_until_ready` asks for."""
        self.rows()
        return self


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """A worker's part of the calls of a microbatch.

    rows: [n] of the call.
    num_rows: of the worker's call: n and padding, whose contents do not matter.
    slot: of the layout that the worker has; given back with the Share.
    """

    rows: np.ndarray
    num_rows: int
    slot: int

    def take(self, array: np.ndarray) -> np.ndarray:
        """[num_rows, ...] of an array [R, ...]; a view where the rows stand together."""
        first, count = (int(self.rows[0]), len(self.rows)) if len(self.rows) else (0, 0)
        if first + self.num_rows <= len(array) and (np.diff(self.rows) == 1).all():
            return array[first : first + self.num_rows]
        taken = np.zeros((self.num_rows, *array.shape[1:]), array.dtype)
        taken[:count] = array[self.rows]
        return taken


class RemoteTier:
    """Serves `attend` by workers; rows travel in `wire_dtype`, converted on tier 1.

    A sequence's pages are on one worker. Pages are numbered one worker after another; `pool_pages` is how many each
    grants, `num_pages` all of them. A call's rows go to all workers at once and come together in their order.

    Args:
      sites: of the plan.
      weights: arrays of the weights that sites read.
      workers: HOST:PORT of each.
      secret: shared with all; None for loopback.
      tls: of this side; None: no TLS.
      max_pages: pages that can be used at most of one worker.
      page_size, dtype: of the pools.
      wire_dtype: one of WIRE_DTYPES.
      tier1: where rows are before they leave and when they are back.
    Raises:
      ConfigError: a site that workers do not serve.
      WorkerError: a worker is not there, or refuses.
    """

    def __init__(
        self,
        sites: Sequence[PlannedSite],
        weights: Mapping[Value, jax.Array],
        *,
        workers: Sequence[str],
        secret: bytes | None,
        tls: ssl.SSLContext | None,
        max_pages: int,
        page_size: int,
        dtype: Any,
        wire_dtype: str,
        tier1: Any,
    ) -> None:
        self._tier1, self._wire_dtype = tier1, wire_dtype
        self._host = jax.local_devices(backend="cpu")[0]
        self.place = f"worker {', '.join(workers)}"
        self._page_size = page_size
        self._out_shapes = [(site.spec.num_heads, site.spec.v_head_dim) for site in sites if site.spec is not None]
        descriptions = describe(sites, weights, page_size=page_size, dtype=dtype)
        hello = Hello(
            fingerprint=fingerprint(descriptions),
            generation=time.time_ns(),
            page_budget=max_pages,
            sites=descriptions,
        )
        self._workers = [_Worker(address, hello, secret, tls) for address in workers]
        self.pool_pages = tuple(worker.num_pages for worker in self._workers)
        self.num_pages = sum(self.pool_pages)
        self.pool_bytes = sum(worker.pool_bytes for worker in self._workers)

    def place_layout(self, layout: AttentionLayout) -> list[Share]:
        """Each worker's part of the call, in their order."""
        firsts = itertools.accumulate(self.pool_pages, initial=0)
        parts = (
            select(layout, first_page=first, num_pages=count, page_size=self._page_size)
            for first, count in zip(firsts, self.pool_pages, strict=False)
        )
        return [worker.place(rows, part) for worker, (rows, part) in zip(self._workers, parts, strict=True)]

    def begin(self, arrays: tuple[jax.Array, ...]) -> list[Leaving]:
        """Convert what travels, and start to bring it to the host."""
        wired = to_wire(arrays, self._wire_dtype)
        start_copy(wired, self._host)
        return [Leaving(wired=array, dtype=row.dtype) for array, row in zip(wired, arrays, strict=True)]

    def attend(self, site: int, layouts: Sequence[Share], inputs: Sequence[Leaving]) -> PendingRows:
        """Send q, k and v of the rows on their way; `fetch` waits for the answers."""
        arrays = [np.asarray(each.wired) for each in inputs]
        shape = wired_shape((len(arrays[0]), *self._out_shapes[site]), self._wire_dtype)
        calls = [
            (share.rows, worker.attend(site, share.slot, [share.take(array) for array in arrays], shape[1:]))
            for worker, share in zip(self._workers, layouts, strict=True)
            if len(share.rows)
        ]
        return PendingRows(lambda: _together(calls, shape, arrays[0].dtype), inputs[0].dtype)

    def fetch(self, pending: PendingRows) -> tuple[jax.Array, ...]:
        """[R, heads, v_head_dim] on tier 1, in the dtype that q had there."""
        return from_wire([jax.device_put(pending.rows(), self._tier1)], pending.dtype)


def _by_name(layout: AttentionLayout) -> dict[str, np.ndarray]:
    return {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}


def _together(
    calls: Sequence[tuple[np.ndarray, Callable[[], np.ndarray]]], shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    out = np.zeros(shape, dtype)  # rows of no sequence are 0
    for rows, answer in calls:
        out[rows] = answer()[: len(rows)]
    return out


class _Worker:
    """A connection whose errors name the worker."""

    def __init__(self, address: str, hello: Hello, secret: bytes | None, tls: ssl.SSLContext | None) -> None:
        self._address = address
        host, port = split_address(address)
        self._client: WorkerClient = self._guard(lambda: connect(host, port, hello, secret=secret, tls=tls))
        weakref.finalize(self, self._client.close)  # its threads would keep it for ever
        self._free_slots = list(range(MAX_LAYOUTS))
        self.num_pages = self._client.welcome.page_budget
        self.pool_bytes = cast("int", self._guard(lambda: self._client.stats().result()).values["pool_bytes"])

    def place(self, rows: np.ndarray, layout: AttentionLayout) -> Share:
        """Send the layout of these rows, once for all sites of a microbatch."""
        if not len(rows):
            return Share(rows=rows, num_rows=0, slot=0)
        if not self._free_slots:
            raise WorkerError(f"worker {self._address}: {MAX_LAYOUTS} microbatches in flight; allowed: no more")
        slot = self._free_slots.pop()
        self._guard(lambda: self._client.layout(slot=slot, arrays=_by_name(layout)))
        share = Share(rows=rows, num_rows=len(layout.row_slot), slot=slot)
        # Messages arrive in order: what comes after the last call of this Share may take its slot.
        weakref.finalize(share, self._free_slots.append, slot).atexit = False
        return share

    def attend(
        self, site: int, layout: int, inputs: Sequence[np.ndarray], row_shape: tuple[int, ...]
    ) -> Callable[[], np.ndarray]:
        q, k, v = inputs
        answer = self._guard(lambda: self._client.attend(site=site, layout=layout, q=q, k=k, v=v))
        return lambda: self._rows(answer, (len(q), *row_shape), q.dtype)

    def _rows(self, answer: Answer[Result], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        out = self._guard(lambda: answer.result().out)
        if out.shape != shape or out.dtype != dtype:
            raise WorkerError(f"worker {self._address} answered {out.dtype}{out.shape}; allowed: {dtype}{shape}")
        return out

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except TransportError as error:
            raise WorkerError(f"worker {self._address}: {error}") from error
