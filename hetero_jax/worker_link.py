"""A worker that may be lost and come back: one connection after another, each with a pool of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from hetero_jax.errors import HeteroJaxError
from hetero_jax.scheduler_types import PoolDraining, PoolEvent, PoolJoined, PoolLost, PoolMeasured
from hetero_jax.worker_session import WorkerSession
from transport import Hello

_logger = logging.getLogger(__name__)
_RETRY_S = 1.0
_LONGEST_RETRY_S = 32.0
_STEADY_S = 60.0  # a session that lasted so long was no mistake
_NEWS = 0.05  # a speed that differs from what was told by less is not


class WorkerLink:
    """Connects to a worker again and again. One thread calls it; connecting blocks a thread of its own.

    Each loss costs a prefill of what the worker had. So one that is lost again soon after it came is tried again later
    and later: after the first time at once, then in 1 s, 2 s, 4 s ...

    Args:
      name: what messages call the worker.
      connect: begins a session of what the worker is to serve, or raises HeteroJaxError or OSError.
      take_number: gives the number of the next pool.
    """

    def __init__(self, name: str, connect: Callable[[Hello], WorkerSession], take_number: Callable[[], int]) -> None:
        self.name, self.wanted = name, True
        self.session: WorkerSession | None = None
        self.pool = -1  # of the session
        self._connect, self._take_number = connect, take_number
        self._attempt: Future[WorkerSession] | None = None
        self._retry_at_s = self._began_s = self._pause_s = 0.0
        self._draining = False
        self._told_speed = 0.0
        self._complained = False  # once an outage

    @property
    def gone(self) -> bool:
        """It is not wanted any more, and nothing is left of it."""
        return not self.wanted and self.session is None

    def join(self, hello: Hello) -> PoolJoined:
        """Connect now. Raises what `connect` raises."""
        return self._begin(self._connect(hello))

    def try_join(self, hello: Hello) -> PoolJoined | None:
        """Connect now where it is not connected; None where that fails, to be tried again."""
        return None if self.session is not None else self._try(partial(self._connect, hello))

    def poll(self, greet: Callable[[], Hello]) -> PoolEvent | None:
        """What has happened since; at most one event a call, to be asked for until there is none.

        Args:
          greet: makes a Hello for the next session.
        """
        if self.session is None:
            return self._poll_attempt(greet)
        self.session.look()
        if (failure := self.session.failure) is not None:
            _logger.warning("worker %s is lost, its sequences are computed again: %s", self.name, failure)
            self._pause()
            return self._lose()
        if (self.session.draining or not self.wanted) and not self._draining:
            self._draining = True
            _logger.warning("worker %s is about to leave, its sequences move to others", self.name)
            return PoolDraining(self.pool)
        speed = self.session.speed
        if speed is not None and abs(speed - self._told_speed) > _NEWS * self._told_speed:
            self._told_speed = speed
            return PoolMeasured(self.pool, speed)
        return None

    def let_go(self) -> PoolLost:
        """Nothing is left in the pool of a session that drains: end it."""
        return self._lose()

    def _begin(self, session: WorkerSession) -> PoolJoined:
        self.session, self.pool, self._began_s = session, self._take_number(), time.monotonic()
        self._draining, self._told_speed, self._complained = False, 0.0, False
        return PoolJoined(self.pool, session.num_pages, session.page_format)

    def _lose(self) -> PoolLost:
        assert self.session is not None, f"worker {self.name} has no session"
        self.session.close()
        self.session = None
        return PoolLost(self.pool)

    def _pause(self) -> None:
        now_s = time.monotonic()
        if now_s - self._began_s > _STEADY_S:
            self._pause_s = 0.0
        self._retry_at_s = now_s + self._pause_s
        self._pause_s = min(max(2 * self._pause_s, _RETRY_S), _LONGEST_RETRY_S)

    def _poll_attempt(self, greet: Callable[[], Hello]) -> PoolJoined | None:
        if not self.wanted:
            return None
        if self._attempt is None:
            if time.monotonic() >= self._retry_at_s:
                self._attempt = _in_a_thread(partial(self._connect, greet()))
            return None
        if not self._attempt.done():
            return None
        attempt, self._attempt = self._attempt, None
        joined = self._try(attempt.result)
        if joined is not None:
            _logger.warning("worker %s has joined with %d pages", self.name, joined.num_pages)
        return joined

    def _try(self, connect: Callable[[], WorkerSession]) -> PoolJoined | None:
        try:
            return self._begin(connect())
        except (HeteroJaxError, OSError) as error:
            self._retry_at_s = time.monotonic() + _RETRY_S
            if not self._complained:
                _logger.warning("no connection to worker %s yet: %s", self.name, error)
            self._complained = True
            return None


def _in_a_thread(call: Callable[[], WorkerSession]) -> Future[WorkerSession]:
    future: Future[WorkerSession] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="worker link", daemon=True).start()
    return future
