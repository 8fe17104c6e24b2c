"""A connection to a worker, as long as it lasts."""

from __future__ import annotations

import dataclasses
import ssl
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from hetero_jax.attention_layout import GroupedLayout
from hetero_jax.depth import CallTimes
from hetero_jax.endpoint import split_address
from hetero_jax.errors import WorkerError
from hetero_jax.pool_session import PlacedRows
from hetero_jax.speed import SpeedMeter, Work
from hetero_jax.tracing import PageCopy, Trace, WorkerCall
from transport import MAX_LAYOUTS, MAX_PAGES_BYTES, Answer, Hello, Result, Stats, TransportError, WorkerClient, connect
from transport.errors import ConnectionLostError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Share(PlacedRows):
    """A worker's part of the calls of a microbatch.

    slot: of the layout that the worker has; given back with the Share.
    work: what its calls say of the worker's speed; None: nothing.
    """

    session: WorkerSession
    slot: int
    work: Work | None

    def attend(self, site: int, inputs: Sequence[np.ndarray], row_shape: tuple[int, ...]) -> Call:
        """As PlacedRows."""
        return self.session.attend(site, self, inputs, row_shape)


class WorkerSession:
    """A worker's pool while the connection lasts; once it is lost, nothing that was written there counts.

    Args:
      address: HOST:PORT.
      hello: what the worker is to serve; its generation must be newer than any before. `sites` keeps what it has.
      secret: shared with the worker; None for loopback.
      tls: of this side; None: no TLS.
      step_timeout_s: a worker that has calls to answer and answers none for so long is lost, connected or not.
      query_ahead_s: as of EngineConfig.
      window: of the plan.
    Raises:
      WorkerError: nobody is there, or refuses.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        secret: bytes | None,
        tls: ssl.SSLContext | None,
        *,
        step_timeout_s: float,
        query_ahead_s: float,
        window: int | None,
    ) -> None:
        self.address, self.sites = address, hello.sites
        host, port = split_address(address)
        self._client: WorkerClient = self._guard(lambda: connect(host, port, hello, secret=secret, tls=tls))
        weakref.finalize(self, self._client.close)  # its threads would keep it for ever
        self._step_timeout_s, self._query_ahead_s = step_timeout_s, query_ahead_s
        self._failure: str | None = None
        self._free_slots = list(range(MAX_LAYOUTS))
        self.times = CallTimes()
        self._meter = SpeedMeter(num_sites=len(hello.sites), window=window)
        self._take_stock(self._guard(lambda: self._client.stats().result(step_timeout_s)))

    def _take_stock(self, stats: Stats) -> None:
        self.num_pages = self._client.welcome.page_budget
        self.pool_bytes = cast("int", stats.values["pool_bytes"])
        self._pages_at_once = MAX_PAGES_BYTES * self.num_pages // self.pool_bytes
        self.page_format = cast("str", stats.values["page_format"]) if self._pages_at_once else ""

    @property
    def failure(self) -> str | None:
        """Why it is lost; None while it is not."""
        return self._failure or self._client.failure

    @property
    def speed(self) -> float | None:
        """KV positions that the worker attends to in a second, of any one site; None: not known yet."""
        return self._meter.speed

    @property
    def draining(self) -> bool:
        """The worker is about to leave."""
        return self._client.draining.is_set()

    def renew(self, hello: Hello) -> Answer[Stats] | None:
        """Ask for another pool in place of the present one and all that is in it; `granted` takes what this gives."""
        self.sites = hello.sites
        self._unless_lost(lambda: self._client.hello(hello))
        return self._unless_lost(self._client.stats)  # answers come in order

    def granted(self, stats: Answer[Stats] | None) -> bool:
        """Wait for the other pool; False where the worker is lost, or refused."""
        found = None if stats is None else self.finish(stats)
        if found is not None:
            self._take_stock(found)
        return found is not None

    def place(self, rows: np.ndarray, layout: GroupedLayout) -> Share:
        """As PoolSession."""
        if not self._free_slots:
            raise WorkerError(f"worker {self.address}: {MAX_LAYOUTS} microbatches in flight; allowed: no more")
        slot = self._free_slots.pop()
        self._unless_lost(lambda: self._client.layout(slot=slot, arrays=_by_name(layout)))
        work = self._meter.begin(layout)
        share = Share(session=self, rows=rows, num_rows=layout.call_rows, slot=slot, work=work)
        # Messages arrive in order: what comes after the last call of this Share may take its slot.
        weakref.finalize(share, self._free_slots.append, slot).atexit = False
        return share

    def attend(self, site: int, share: Share, inputs: Sequence[np.ndarray], row_shape: tuple[int, ...]) -> Call:
        """As PlacedRows."""
        q, *kept = inputs
        k, v = kept or (None, None)
        # q leaves before k and v where the worker can do something while these are on their way.
        ahead = bool(kept) and self.times.transfer_s(sum(array.nbytes for array in kept)) >= self._query_ahead_s
        began_s = time.monotonic()
        answer = self._unless_lost(
            lambda: self._client.attend(site=site, layout=share.slot, q=q, k=k, v=v, ahead=ahead)
        )
        sent = Sent(began_s, time.monotonic(), sum(array.nbytes for array in inputs), ahead)
        return Call(self, answer, sent, (len(q), *row_shape), q.dtype, share.work)

    def observe(self, work: Work | None, *, trip_s: float, began_ns: int, ended_ns: int, num_bytes: int) -> None:
        """A call is back, `trip_s` after it was sent. num_bytes: as of CallTimes."""
        latency_s = self._client.round_trip_s
        times = {"trip_s": trip_s, "began_ns": began_ns, "ended_ns": ended_ns}
        if latency_s is None:
            num_bytes, latency_s = 0, 0.0  # what the bytes took cannot be told yet
        self.times.observe(**times, num_bytes=num_bytes, latency_s=latency_s)
        if work is not None:
            self._meter.observe(work, began_ns=began_ns, ended_ns=ended_ns)

    def read_ready(self) -> None:
        """Take the answers that have come."""
        self._client.read_ready()

    def look(self) -> None:
        """Count the worker as lost where it has calls and answers none; requests are answered in order."""
        if self._left_s() <= 0:
            self._client.read_ready()
        if self._left_s() <= 0:
            self._failure = f"it is connected, but answered nothing for {self._step_timeout_s:g} s"
            self._client.close()

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def copy_pages(
        self, pages: Sequence[int], target: WorkerSession, target_pages: Sequence[int], trace: Trace | None
    ) -> bool:
        """Copy pages into as many of another worker of the same page format; False where one of both is lost.

        Waits for the calls that this worker has; what is sent to the target later finds the pages there.
        """
        ours, theirs = np.asarray(pages, np.int64), np.asarray(target_pages, np.int64)
        for first in range(0, len(ours), self._pages_at_once):
            some = slice(first, first + self._pages_at_once)
            asked_s = time.monotonic()
            answer = self._unless_lost(lambda some=some: self._client.fetch_pages(ours[some]))
            found = None if answer is None else self.finish(answer)
            there_s = time.monotonic()
            if found is None or not target.store_pages(theirs[some], found.arrays):
                return False
            if trace is not None:
                size = sum(array.nbytes for array in found.arrays)
                when = {"asked_s": asked_s, "there_s": there_s, "sent_s": time.monotonic()}
                trace.copied(PageCopy(self.address, target.address, len(ours[some]), size, **when))
        return True

    def store_pages(self, pages: np.ndarray, arrays: tuple[np.ndarray, ...]) -> bool:
        """Put what another worker's pages hold into pages [n]; False where the worker is lost."""
        self._unless_lost(lambda: self._client.store_pages(pages, arrays))
        return self.failure is None

    def finish(self, answer: Answer[T]) -> T | None:
        """Waits for an answer; None where the worker is lost."""
        return self._unless_lost(lambda: self._wait(answer))

    def _wait(self, answer: Answer[T]) -> T:
        while True:
            try:
                return answer.result(max(self._left_s(), 0.0))
            except TimeoutError:
                self.look()

    def _left_s(self) -> float:
        """How long it may still answer nothing."""
        since_s = self._client.waiting_since_s
        return self._step_timeout_s + (0.0 if since_s is None else since_s - time.monotonic())

    def _unless_lost(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except ConnectionLostError as error:
            self._failure = self.failure or str(error)
            error.__traceback__ = None  # whoever holds the error would hold these frames, and the engine with them
            return None
        except TransportError as error:
            raise WorkerError(f"worker {self.address}: {error}") from error

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except TransportError as error:
            raise WorkerError(f"worker {self.address}: {error}") from error


class Sent(NamedTuple):
    """When a request was sent, by the monotonic clock, its bytes, and whether q went ahead."""

    begin_s: float
    end_s: float
    num_bytes: int
    ahead: bool


class Call:
    """A worker's part of a call, under way. answer: None where the worker is lost."""

    def __init__(
        self,
        session: WorkerSession,
        answer: Answer[Result] | None,
        sent: Sent,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        work: Work | None,
    ) -> None:
        self._session, self._answer, self._sent, self._shape, self._dtype = session, answer, sent, shape, dtype
        self._work = work
        self._trace: tuple[Trace, str] | None = None

    def traced_by(self, trace: Trace, name: str) -> None:
        """As PendingCall, as what follows."""
        self._trace = trace, name

    def is_ready(self) -> bool:
        if self._answer is None or self._answer.done:
            return True
        self._session.read_ready()
        return self._answer.done

    def rows(self) -> np.ndarray | None:
        answer = self._answer
        result = None if answer is None else self._session.finish(answer)
        if answer is None or result is None:
            return None
        out = result.out
        if out.shape != self._shape or out.dtype != self._dtype:
            seen, allowed = f"{out.dtype}{out.shape}", f"{self._dtype}{self._shape}"
            raise WorkerError(f"worker {self._session.address} answered {seen}; allowed: {allowed}")
        worked = {"began_ns": result.began_ns, "ended_ns": result.ended_ns}
        moved = 0 if self._sent.ahead else self._sent.num_bytes + out.nbytes
        trip_s = answer.done_at_s - self._sent.begin_s
        self._session.observe(self._work, trip_s=trip_s, num_bytes=moved, **worked)
        if self._trace is not None:
            trace, name = self._trace
            ours = {"begin_s": self._sent.begin_s, "sent_s": self._sent.end_s, "done_s": answer.done_at_s}
            moved = {"bytes_up": self._sent.num_bytes, "bytes_down": out.nbytes}
            trace.called(self._session.address, WorkerCall(name=name, **ours, **worked, **moved))
        return out


def _by_name(layout: GroupedLayout) -> dict[str, np.ndarray]:
    return {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
