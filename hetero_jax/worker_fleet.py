"""All workers of an engine: those that are there, those that are awaited, and the pools that they bring."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from hetero_jax.errors import WorkerError
from hetero_jax.offer import Offer
from hetero_jax.pool_session import PoolSession
from hetero_jax.scheduler import Scheduler
from hetero_jax.scheduler_types import PoolEvent, PoolLost
from hetero_jax.tracing import Trace
from hetero_jax.worker_link import WorkerLink
from hetero_jax.worker_session import WorkerSession
from hetero_jax.workers_file import WorkersFile
from transport import Hello

_logger = logging.getLogger(__name__)
_POLL_S = 0.05


class WorkerFleet:
    """Keeps connections to workers and tells a scheduler which pools there are. For one thread.

    Args:
      addresses: HOST:PORT of workers that must be there now.
      connect: begins a session with an address.
      local: begins one with each worker of this machine, by its name; these must be there too.
      offer: what workers are to serve.
      file: further addresses; those that cannot be reached yet are tried again while the job runs.
      wait_s: how long a job waits where no worker can go on with it.

    trace: of pages that move; None: nothing is recorded.

    Raises:
      WorkerError: a worker is not there, or refuses.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        connect: Callable[[str, Hello], WorkerSession],
        local: Mapping[str, Callable[[Hello], WorkerSession]],
        offer: Offer,
        file: WorkersFile | None,
        wait_s: float,
    ) -> None:
        self.num_lost = self.num_moved = 0
        self.trace: Trace | None = None
        self._connect, self._offer, self._file, self._wait_s = connect, offer, file, wait_s
        self._numbers = itertools.count()
        connects = {address: partial(connect, address) for address in addresses} | dict(local)
        self._links = [self._link(name, each) for name, each in connects.items()]
        self._joined: list[PoolEvent] = [link.join(self._hello()) for link in self._links]  # not told yet
        self._fixed = frozenset(connects)
        if file is not None:
            self._follow_file(file)
            self._joined += [event for link in self._links if (event := link.try_join(self._hello())) is not None]

    @property
    def sessions(self) -> Mapping[int, PoolSession]:
        """Sessions by the number of their pool."""
        return self._workers

    @property
    def _workers(self) -> dict[int, WorkerSession]:
        return {link.pool: link.session for link in self._links if link.session is not None}

    def _hello(self) -> Hello:
        """To the next worker."""
        return self._offer.whole()

    def follow(self, scheduler: Scheduler) -> bool:
        """Tell the scheduler what has happened to pools; True where it was told.

        Sequences leave the pools that drain, with their pages where these can move, and what they have left is let go.
        """
        events = [*self._joined, *self._changes()]
        self._joined = []
        for event in events:
            scheduler.apply(event)
        self._move(scheduler)
        for number in scheduler.drained_pools:
            scheduler.apply(self._let_go(number))
        return bool(events)

    def _move(self, scheduler: Scheduler) -> None:
        num_replays = scheduler.num_replays
        moves = scheduler.migrate()
        for move in moves:
            source, target = self._workers[move.source], self._workers[move.target]
            if source.copy_pages(move.source_pages, target, move.target_pages, self.trace):
                self.num_moved += 1
            else:
                scheduler.replay(move.seq_id)
        if again := scheduler.num_replays - num_replays:
            _logger.warning("%d sequences left without their pages and are computed again", again)

    def record(self, scheduler: Scheduler) -> None:
        """Trace the KV positions that each worker's sequences have."""
        if self.trace is not None:
            sessions = self.sessions
            for number, load in scheduler.loads.items():
                self.trace.count(f"KV positions of {sessions[number].address}", load)

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
        if self._file is not None and self._file.changed():
            self._follow_file(self._file)
        for link in self._links:
            while (event := link.poll(self._hello)) is not None:
                self.num_lost += isinstance(event, PoolLost)
                yield event
        self._links = [link for link in self._links if not link.gone]

    def _let_go(self, pool: int) -> PoolLost:
        (link,) = (link for link in self._links if link.session is not None and link.pool == pool)
        return link.let_go()

    def _follow_file(self, file: WorkersFile) -> None:
        known = {link.name for link in self._links}
        for address in file.addresses:
            if address not in known:
                self._links.append(self._link(address, partial(self._connect, address)))
        for link in self._links:
            link.wanted = link.name in self._fixed or link.name in file.addresses

    def _link(self, name: str, connect: Callable[[Hello], WorkerSession]) -> WorkerLink:
        return WorkerLink(name, connect, self._numbers.__next__)
