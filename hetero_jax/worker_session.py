"""A connection to a worker, as long as it lasts."""

from __future__ import annotations

import dataclasses
import ssl
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from hetero_jax.attention_layout import AttentionLayout
from hetero_jax.endpoint import split_address
from hetero_jax.errors import WorkerError
from transport import MAX_LAYOUTS, Answer, Hello, Result, TransportError, WorkerClient, connect
from transport.errors import ConnectionLostError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """A worker's part of the calls of a microbatch.

    rows: [n] of the call.
    num_rows: of the worker's call: n and padding, whose contents do not matter.
    slot: of the layout that the worker has; given back with the Share.
    """

    session: WorkerSession
    rows: np.ndarray
    num_rows: int
    slot: int

    def take(self, array: np.ndarray) -> np.ndarray:
        """[num_rows, ...] of an array [R, ...]; a view where the rows stand together."""
        first, count = int(self.rows[0]), len(self.rows)
        if first + self.num_rows <= len(array) and (np.diff(self.rows) == 1).all():
            return array[first : first + self.num_rows]
        taken = np.zeros((self.num_rows, *array.shape[1:]), array.dtype)
        taken[:count] = array[self.rows]
        return taken


class WorkerSession:
    """A worker's pool while the connection lasts; once it is lost, nothing that was written there counts.

    Args:
      address: HOST:PORT.
      hello: what the worker is to serve; its generation must be newer than any before.
      secret: shared with the worker; None for loopback.
      tls: of this side; None: no TLS.
      step_timeout_s: a worker that has calls to answer and answers none for so long is lost, connected or not.
    Raises:
      WorkerError: nobody is there, or refuses.
    """

    def __init__(
        self, address: str, hello: Hello, secret: bytes | None, tls: ssl.SSLContext | None, *, step_timeout_s: float
    ) -> None:
        self.address = address
        host, port = split_address(address)
        self._client: WorkerClient = self._guard(lambda: connect(host, port, hello, secret=secret, tls=tls))
        weakref.finalize(self, self._client.close)  # its threads would keep it for ever
        self._step_timeout_s = step_timeout_s
        self._failure: TransportError | None = None
        self._free_slots = list(range(MAX_LAYOUTS))
        self.num_pages = self._client.welcome.page_budget
        stats = self._guard(lambda: self._client.stats().result(step_timeout_s))
        self.pool_bytes = cast("int", stats.values["pool_bytes"])

    @property
    def failure(self) -> TransportError | None:
        """Why it is lost; None while it is not."""
        return self._failure or self._client.failure

    @property
    def draining(self) -> bool:
        """The worker is about to leave."""
        return self._client.draining.is_set()

    def place(self, rows: np.ndarray, layout: AttentionLayout) -> Share:
        """Send the layout of these rows, at least one, once for all sites of a microbatch."""
        if not self._free_slots:
            raise WorkerError(f"worker {self.address}: {MAX_LAYOUTS} microbatches in flight; allowed: no more")
        slot = self._free_slots.pop()
        self._unless_lost(lambda: self._client.layout(slot=slot, arrays=_by_name(layout)))
        share = Share(session=self, rows=rows, num_rows=len(layout.row_slot), slot=slot)
        # Messages arrive in order: what comes after the last call of this Share may take its slot.
        weakref.finalize(share, self._free_slots.append, slot).atexit = False
        return share

    def attend(
        self, site: int, share: Share, inputs: Sequence[np.ndarray], row_shape: tuple[int, ...]
    ) -> Callable[[], np.ndarray | None]:
        """Send q, k and v of the rows on their way.

        Returns:
          What waits for the answer, [R, *row_shape]; it gives None where the worker is lost, and raises WorkerError
          where it failed otherwise.
        """
        q, k, v = inputs
        answer = self._unless_lost(lambda: self._client.attend(site=site, layout=share.slot, q=q, k=k, v=v))
        if answer is None:
            return lambda: None
        return lambda: self._rows(answer, (len(q), *row_shape), q.dtype)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def _rows(self, answer: Answer[Result], shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
        result = self._unless_lost(lambda: self._wait(answer))
        if result is None:
            return None
        out = result.out
        if out.shape != shape or out.dtype != dtype:
            raise WorkerError(f"worker {self.address} answered {out.dtype}{out.shape}; allowed: {dtype}{shape}")
        return out

    def _wait(self, answer: Answer[Result]) -> Result:
        """Requests are answered in order, so that any answer is progress."""
        started_s, left_s = time.monotonic(), self._step_timeout_s
        while left_s > 0:
            try:
                return answer.result(left_s)
            except TimeoutError:
                left_s = max(started_s, self._client.answered_s) + self._step_timeout_s - time.monotonic()
        error = ConnectionLostError(f"it is connected, but answered nothing for {self._step_timeout_s:g} s")
        self._failure = error
        self._client.close()
        raise error

    def _unless_lost(self, call: Callable[[], T]) -> T | None:
        try:
            return self._guard(call)
        except WorkerError as error:
            if not isinstance(error.__cause__, ConnectionLostError):
                raise
            self._failure = self.failure or error.__cause__
            return None

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except TransportError as error:
            raise WorkerError(f"worker {self.address}: {error}") from error


def _by_name(layout: AttentionLayout) -> dict[str, np.ndarray]:
    return {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
