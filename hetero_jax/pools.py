"""In which pool a sequence runs: the pools that are there, how fast they are, and who goes from one to another.

Pure, as the scheduler that owns it. A microbatch is back when its slowest worker is, and a worker takes about as long
as its sequences have KV positions to attend to. So a pool's *time* is its load, those positions, by its speed; pools
that are not measured count as fast as the measured ones do on average. Then:

1. A sequence enters the pool that has the least time with it, of those that have room (`find_room`). Loads therefore
   grow in proportion to speeds, as far as pages allow.
2. Where pools are out of balance (a worker has joined, or became slow), a running sequence of the pool with most time
   moves to the one that has least with it (`rebalance`): the one that has most tokens to come, so that the move pays
   longest. Only pools of one page format exchange sequences, and only where the target could hold all of it now.
3. It moves if the target has a tenth less time with it than its own pool now, and if the fall of the larger of the two
   times, over all tokens that it may still generate, saves more than the copy costs: as long as it takes to attend to
   what is copied _COPY_COST times.
4. Who has moved stays for as many tokens: so copying never costs more than attending does, whatever speeds are told.

With loads and speeds as they are, every move lowers the larger of two times, so moves come to an end; and because of
the tenth, the ratio of two speeds must change by a fifth before any sequence would go back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from hetero_jax.page_tables import PageTables
from hetero_jax.pages import PageAllocator
from hetero_jax.prefixes import Prefixes
from hetero_jax.scheduler_state import Pool, ScheduledSequence
from hetero_jax.scheduler_types import Move, PoolJoined, SchedulerConfig

_MARGIN = 0.1
_COPY_COST = 64  # 60 over loopback, without authentication (docs/benchmarks.md)


class Pools:
    """The pools by number, and the rules of the module docstring."""

    def __init__(self, config: SchedulerConfig, tables: PageTables) -> None:
        self._config, self._tables = config, tables
        self._pools: dict[int, Pool] = {}
        self._usual_speed = 1.0
        self.largest = 0  # pages, of all that ever joined

    def __len__(self) -> int:
        return len(self._pools)

    @property
    def pages_used(self) -> int:
        return sum(pool.pages.num_used for pool in self._pools.values())

    @property
    def pages_total(self) -> int:
        return sum(pool.pages.num_pages for pool in self._pools.values())

    @property
    def any_draining(self) -> bool:
        return any(pool.draining for pool in self._pools.values())

    @property
    def drained(self) -> list[int]:
        """Draining pools that nothing is left in."""
        return [pool.number for pool in self._pools.values() if pool.draining and pool.num_running == 0]

    @property
    def loads(self) -> dict[int, int]:
        """KV positions that the next decode rows of each pool's sequences attend to."""
        return {number: pool.load for number, pool in self._pools.items()}

    # --- events

    def join(self, joined: PoolJoined) -> None:
        assert joined.pool not in self._pools, f"pool {joined.pool} is there already"
        prefixes = Prefixes(self._config.num_groups)
        num_whole = self._config.windows.count(None)
        pages = PageAllocator(joined.num_pages)
        self._pools[joined.pool] = Pool(joined.pool, pages, prefixes, joined.page_format, num_whole)
        self.largest = max(self.largest, joined.num_pages)

    def drain(self, number: int) -> None:
        self._pools[number].draining = True

    def measure(self, number: int, speed: float) -> None:
        assert speed > 0, f"speed={speed} of pool {number}"
        self._pools[number].speed = speed
        self._average()

    def lose(self, number: int) -> Pool:
        pool = self._pools.pop(number)
        pool.lost = True
        self._average()
        return pool

    # --- choices

    def has_home(self, seq: ScheduledSequence) -> bool:
        """Whether a pool can hold the whole sequence, now or later."""
        return bool(self._homes(seq))

    def find_room(self, seq: ScheduledSequence) -> Pool | None:
        """The pool for a waiting sequence; None where none has room."""
        return self._best(self._homes(seq), seq, lambda pool: self._tables.needed(seq, pool))

    def move(self, seq: ScheduledSequence) -> Move | None:
        """Moves a sequence to the best pool that takes its pages now; None where none does."""
        pool = self._best(self._alike(seq), seq, lambda pool: len(seq.held) + seq.promised)
        return None if pool is None else seq.move(pool)

    def rebalance(self, idle: Iterable[ScheduledSequence]) -> Move | None:
        """Moves one of these sequences, which are not in flight, where it pays; None where it does not."""
        staying = [pool for pool in self._pools.values() if not pool.draining]
        slowest = max(staying, key=self._time_s, default=None)
        movable = [seq for seq in idle if seq.pool is slowest and _may_move(seq)]
        if slowest is None or not movable:
            return None
        targets = self._targets(slowest, staying, min(seq.reads for seq in movable))
        for seq in sorted(movable, key=lambda seq: (-seq.tokens_left, seq.arrival)) if targets else ():
            most = self._config.most_pages(seq.max_known - 1)
            large = (pool for pool in targets if pool.pages.num_pages >= most)
            target = self._best(large, seq, lambda pool, most=most: most)
            if target is not None and self._pays(seq, target):
                return seq.move(target)
        return None

    def _targets(self, slowest: Pool, pools: Iterable[Pool], least: int) -> list[Pool]:
        """Those that take pages of the slowest pool, and would be faster by the margin with so many positions more."""
        limit_s = (1 - _MARGIN) * self._time_s(slowest)
        return [pool for pool in pools if pool.exchanges_with(slowest) and self._time_s(pool, least) <= limit_s]

    def _homes(self, seq: ScheduledSequence) -> list[Pool]:
        most = self._config.most_pages(seq.max_known - 1)
        return [pool for pool in self._pools.values() if not pool.draining and pool.pages.num_pages >= most]

    def _alike(self, seq: ScheduledSequence) -> list[Pool]:
        """Other pools that can hold the whole sequence and take pages of its own."""
        return [pool for pool in self._homes(seq) if pool is not seq.home and pool.exchanges_with(seq.home)]

    def _best(self, pools: Iterable[Pool], seq: ScheduledSequence, needed: Callable[[Pool], int]) -> Pool | None:
        """The one that has the least time with the sequence, of those that let it in; the roomiest of several."""
        open_now = [pool for pool in pools if pool.num_running == 0 or needed(pool) <= pool.room]
        return min(open_now, key=lambda pool: (self._time_s(pool, seq.reads), -pool.room), default=None)

    def _pays(self, seq: ScheduledSequence, target: Pool) -> bool:
        """Rule 3."""
        now_s, there_s = self._time_s(seq.home), self._time_s(target, seq.reads)
        saved_s = now_s - max(self._time_s(seq.home, -seq.reads), there_s)
        copy_s = _COPY_COST * seq.reads / self._speed(seq.home)
        return there_s <= (1 - _MARGIN) * now_s and saved_s * seq.tokens_left >= copy_s

    def _time_s(self, pool: Pool, more: int = 0) -> float:
        """Of a pool with so many positions more."""
        return (pool.load + more) / self._speed(pool)

    def _speed(self, pool: Pool) -> float:
        return self._usual_speed if pool.speed is None else pool.speed

    def _average(self) -> None:
        """Keep what pools that are not measured count as."""
        measured = [pool.speed for pool in self._pools.values() if pool.speed is not None]
        self._usual_speed = statistics.fmean(measured) if measured else 1.0


def _may_move(seq: ScheduledSequence) -> bool:
    """Rule 4; and what can never pay is not looked at."""
    has_stayed = seq.moved_at is None or seq.known - seq.moved_at >= _COPY_COST
    return has_stayed and seq.tokens_left >= _COPY_COST
