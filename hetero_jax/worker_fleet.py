"""All workers of an engine: those that are there, those that are awaited, and the pools that they bring."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping

from hetero_jax.errors import WorkerError
from hetero_jax.scheduler import Scheduler
from hetero_jax.scheduler_types import PoolEvent, PoolJoined, PoolLost
from hetero_jax.worker_link import WorkerLink
from hetero_jax.worker_session import WorkerSession

_logger = logging.getLogger(__name__)
_POLL_S = 0.05


class WorkerFleet:
    """Keeps connections to workers and tells a scheduler which pools there are. For one thread.

    Args:
      connects: what begins a session, by the worker's name; all are connected to at once.
      wait_s: how long a job waits where no worker can go on with it.
    Raises:
      WorkerError: a worker is not there, or refuses.
    """

    def __init__(self, connects: Mapping[str, Callable[[], WorkerSession]], *, wait_s: float) -> None:
        self.num_lost = 0  # sessions that ended with sequences in them
        self._wait_s = wait_s
        numbers = itertools.count()
        self._links = [WorkerLink(name, connect, numbers.__next__) for name, connect in connects.items()]
        self._joined: list[PoolJoined] = [link.join() for link in self._links]  # not told yet

    @property
    def sessions(self) -> dict[int, WorkerSession]:
        """Sessions by the number of their pool."""
        return {link.pool: link.session for link in self._links if link.session is not None}

    def follow(self, scheduler: Scheduler) -> bool:
        """Tell the scheduler what has happened to pools, and let go those that it has left; True where it was told."""
        events = [*self._joined, *self._changes()]
        self._joined = []
        for event in events:
            scheduler.apply(event)
            self.num_lost += isinstance(event, PoolLost)
        for number in scheduler.drained_pools:
            (link,) = (link for link in self._links if link.session is not None and link.pool == number)
            scheduler.apply(link.let_go())
        return bool(events)

    def wait(self, scheduler: Scheduler) -> None:
        """Nothing runs and nothing can start: wait until a worker comes or goes.

        Raises:
          WorkerError: none did for `wait_s`.
        """
        _logger.warning("no worker can go on with the job; waiting up to %g s for one", self._wait_s)
        deadline_s = time.monotonic() + self._wait_s
        while not self.follow(scheduler):
            if time.monotonic() > deadline_s:
                names = ", ".join(link.name for link in self._links)
                raise WorkerError(f"no worker could go on with the job for {self._wait_s:g} s; known are: {names}")
            time.sleep(_POLL_S)

    def _changes(self) -> Iterator[PoolEvent]:
        for link in self._links:
            while (event := link.poll()) is not None:
                yield event
