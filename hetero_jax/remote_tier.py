"""Tier 2 on other machines: the interface of `AttentionTier` over connections to workers."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hetero_jax.attention_layout import GroupedLayout
from hetero_jax.devices import start_copy
from hetero_jax.joined_rows import JoinedRows
from hetero_jax.pool_session import PendingCall, PlacedRows
from hetero_jax.rows import select
from hetero_jax.tracing import Trace
from hetero_jax.wire import on_host, wired_shape
from hetero_jax.worker_fleet import WorkerFleet
from partition import PlannedSite, Port


class _Joined(NamedTuple):
    """Rows of a site without a kernel, one way and the other."""

    sent: JoinedRows
    answered: JoinedRows


class PendingRows:
    """The answer of a call that is on its way."""

    def __init__(
        self, site: int, parts: Sequence[tuple[PlacedRows, PendingCall]], shape: tuple[int, ...], wired: Any
    ) -> None:
        """parts: each pool's rows, and its call; shape: [R, ...] of dtype `wired`."""
        self.site = site
        self._parts, self._shape, self._wired = parts, shape, wired

    def is_ready(self) -> bool:
        """Whether all is there."""
        return all(call.is_ready() for _, call in self._parts)

    def record(self, trace: Trace, name: str) -> None:
        """Trace the calls."""
        for _, call in self._parts:
            call.traced_by(trace, name)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Waits for [R, ...] as wired.

        Raises:
          WorkerError: a worker failed without being lost.
        """
        answers = [(placed, call.rows()) for placed, call in self._parts]
        if len(answers) == 1 and answers[0][1] is not None and answers[0][0].is_whole(self._shape[0]):
            return answers[0][1]
        out = np.zeros(self._shape, self._wired)  # rows of no sequence are 0
        for placed, found in answers:
            if found is not None:
                out[placed.rows] = found[: len(placed.rows)]
        return out

    def block_until_ready(self) -> PendingRows:
        """What `jax.block_until_ready` asks for."""
        assert self.rows is not None
        return self


class RemoteTier:
    """Serves `attend` by workers; rows travel in `wire_dtype`, which the stages convert to and from.

    A sequence's pages are in one pool. A call's rows go to all pools at once and come together in their order.
    Those of a pool that is lost on the way are 0: no other row depends on them, and the fleet tells of the loss.

    Args:
      sites: of the plan.
      fleet: the workers.
      wire_dtype: one of WIRE_DTYPES.
      tier1: where rows are before they leave.
    """

    def __init__(self, sites: Sequence[PlannedSite], fleet: WorkerFleet, *, wire_dtype: str, tier1: Any) -> None:
        self._fleet, self._tier1, self._wire_dtype = fleet, tier1, wire_dtype
        self.waited_s = 0.0
        self._host = jax.local_devices(backend="cpu")[0]
        self._sites = tuple(sites)
        self._joined = {
            number: _Joined(self._rows([site.inputs[index] for index in site.sent]), self._rows(site.outputs))
            for number, site in enumerate(sites)
            if site.spec is None
        }

    @property
    def place(self) -> str:
        """Where it is."""
        return f"workers {', '.join(session.address for session in self._fleet.sessions.values())}"

    @property
    def num_pages(self) -> int:
        """Pages of all workers that are there."""
        return sum(session.num_pages for session in self._fleet.sessions.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools that are there."""
        return sum(session.pool_bytes for session in self._fleet.sessions.values())

    def place_layout(self, layout: GroupedLayout, pools: Sequence[int]) -> list[PlacedRows]:
        """Each pool's part of the call. pools: of each sequence of the layout, without padding."""
        homes = np.asarray(pools)
        return [
            session.place(*select(layout, np.flatnonzero(homes == pool)))
            for pool, session in self._fleet.sessions.items()
            if pool in pools
        ]

    def begin(self, arrays: tuple[jax.Array, ...]) -> None:
        """Start to bring what travels to the host."""
        start_copy(arrays, self._tier1, self._host)

    def attend(self, site: int, layouts: Sequence[PlacedRows], inputs: Sequence[jax.Array]) -> PendingRows:
        """Send the rows of q, k and v, of q alone where the site shares a pool, or all as one where it has no kernel.

        `fetch` waits for the answers.
        """
        arrays = on_host(inputs)
        spec = self._sites[site].spec
        if spec is None:
            arrays, shape = [self._joined[site].sent.join(arrays)], (self._joined[site].answered.num_bytes,)
        else:
            shape = wired_shape((spec.num_heads, spec.v_head_dim), self._wire_dtype)
        calls = [(placed, placed.attend(site, [placed.take(array) for array in arrays], shape)) for placed in layouts]
        return PendingRows(site, calls, (len(arrays[0]), *shape), arrays[0].dtype)

    def is_ready(self, pending: PendingRows) -> bool:
        """Whether the answers are there."""
        return pending.is_ready()

    def record(self, trace: Trace, name: str, inputs: Sequence[jax.Array], pending: PendingRows) -> None:
        """Trace what `attend` began, once it is back."""
        pending.record(trace, name)

    def away_s(self) -> float:
        """As Tier2: of the slowest worker."""
        times = [session.times for session in self._fleet.sessions.values()]
        return max((each.wire_s + each.tier2_s for each in times), default=0.0)

    def fetch(self, pending: PendingRows) -> Sequence[np.ndarray]:
        """[R, *inner] of each of the site's outputs, as they travelled."""
        begin_s = time.monotonic()
        rows = pending.rows
        self.waited_s += time.monotonic() - begin_s
        joined = self._joined.get(pending.site)
        return [rows] if joined is None else joined.answered.split(rows)

    def _rows(self, ports: Sequence[Port]) -> JoinedRows:
        return JoinedRows.of([(port.layout.inner, port.value.dtype) for port in ports], self._wire_dtype)
