"""All workers as one pool: each serves some KV heads of every sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from hetero_jax.errors import ConfigError
from hetero_jax.head_slices import most_slices
from hetero_jax.offer import Offer
from hetero_jax.pool_session import PoolSession
from hetero_jax.scheduler_types import PoolDraining, PoolEvent, PoolJoined, PoolLost
from hetero_jax.worker_fleet import WorkerFleet
from hetero_jax.worker_group import WorkerGroup
from hetero_jax.worker_session import WorkerSession
from hetero_jax.workers_file import WorkersFile
from transport import Hello

_logger = logging.getLogger(__name__)


class HeadFleet(WorkerFleet):
    """A fleet whose workers form one group after another, each with a pool of its own.

    Where a member comes or goes the group ends, and those that are there are given other heads at once. A worker that
    comes later is left out where every KV head has a worker already, or where it has memory for so little that the
    pool would become smaller than it is.

    Raises:
      ConfigError: more workers than a site has KV heads.
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
        self._most = most_slices(offer.sites)
        self._expected = len({*addresses, *local, *(() if file is None else file.addresses)})
        if self._expected > self._most:
            raise ConfigError(
                f"kv_partition='head' with {self._expected} workers; allowed for this model: at most {self._most}, "
                "the KV heads of the attention that has fewest"
            )
        self._group: WorkerGroup | None = None
        self._number = -1  # of its pool
        self._left_out: set[WorkerSession] = set()  # of this group
        self._complained: set[str] = set()  # addresses of those that ever were
        super().__init__(addresses, connect=connect, local=local, offer=offer, file=file, wait_s=wait_s)
        self._expected, self._joined = 0, list(self._regroup())

    @property
    def sessions(self) -> Mapping[int, PoolSession]:
        """As WorkerFleet: of the group."""
        return {} if self._group is None else {self._number: self._group}

    def _hello(self) -> Hello:
        """To the next worker, as if it came to those that are there."""
        there = len(self._workers)
        count = min(max(there + 1, self._expected), self._most)
        return self._offer.part(min(there, count - 1), count)

    def _changes(self) -> Iterator[PoolEvent]:
        for event in super()._changes():  # of single workers, which are no pools here
            if isinstance(event, PoolDraining):
                self._let_go(event.pool)
        for event in self._regroup():
            if isinstance(event, PoolJoined) and self._group is not None:
                _logger.warning("%s have all KV heads now, %d pages", self._group.address, event.num_pages)
            yield event

    def _regroup(self) -> Iterator[PoolEvent]:
        """Groups end and begin until one has all workers that it should have."""
        while (members := self._next_members()) is not None:
            if self._group is not None:
                self._group.end()
                self._group = None
                yield PoolLost(self._number)
            self._group = self._form(members)
            self._left_out.clear()
            if self._group is not None:
                self._number = next(self._numbers)
                yield PoolJoined(self._number, self._group.num_pages)

    def _next_members(self) -> list[WorkerSession] | None:
        """Who shall form a group now; None: those that do."""
        there = [worker for worker in self._workers.values() if worker.failure is None]
        if self._group is None:
            return there[: self._most] or None
        members = self._group.members
        left = [member for member in members if member in there]
        if len(left) < len(members):
            return left or there[: self._most]
        newcomer = next(filter(self._is_useful, (one for one in there if one not in members)), None)
        return None if newcomer is None else [*members, newcomer]

    def _is_useful(self, newcomer: WorkerSession) -> bool:
        """Whether the group should take it in; it has the heads that it would have there."""
        assert self._group is not None
        if newcomer in self._left_out:
            return False
        count = len(self._group.members) + 1
        if count > self._most:
            why = f"there are {self._most} KV heads, one each for those that are there"
        elif not self._are_given([newcomer], [self._offer.part(count - 1, count)]):
            return False
        elif newcomer.num_pages < self._group.num_pages:
            why = f"it holds {newcomer.num_pages} pages of its heads, those that are there {self._group.num_pages}"
        else:
            return True
        self._left_out.add(newcomer)
        if newcomer.address not in self._complained:
            self._complained.add(newcomer.address)
            _logger.warning("worker %s is left out: %s", newcomer.address, why)
        return False

    def _form(self, members: Sequence[WorkerSession]) -> WorkerGroup | None:
        """A group of these, or of those that are left when some are lost meanwhile; None where none is."""
        while members:
            count = len(members)
            if self._are_given(members, [self._offer.part(index, count) for index in range(count)]):
                return WorkerGroup(members, [self._offer.heads(index, count) for index in range(count)])
            members = [member for member in members if member.failure is None]
        return None

    def _are_given(self, workers: Sequence[WorkerSession], hellos: Sequence[Hello]) -> bool:
        """Give each other heads, all at once, where it has not these; False where one is lost."""
        asked = [
            (worker, worker.renew(hello))
            for worker, hello in zip(workers, hellos, strict=True)
            if worker.sites != hello.sites
        ]
        granted = [worker.granted(answer) for worker, answer in asked]
        return all(granted) and all(worker.failure is None for worker in workers)
