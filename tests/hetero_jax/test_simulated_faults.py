"""Lost and returning workers under a virtual clock: the scheduler, and pools that remember what was written."""

from __future__ import annotations

import heapq
import itertools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hetero_jax.scheduler import Scheduler
from hetero_jax.scheduler_types import Batch, Chunk, PoolDraining, PoolJoined, PoolLost, SchedulerConfig

PAGE = 4


def _next_token(context: list[int]) -> int:
    """What a model would say after these tokens."""
    return zlib.crc32(bytes(token % 251 for token in context)) % 997


@dataclass
class _Worker:
    """Pages by number, and how long a row takes."""

    pages: int
    seconds_per_row: float
    cache: dict[int, int] = field(default_factory=dict)  # token by slot
    dead: bool = False


@dataclass
class _Simulation:
    """An engine whose microbatches take as long as their slowest worker; losses are noticed late."""

    chance: random.Random
    scheduler: Scheduler = field(init=False)
    now_s: float = 0.0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)  # tokens of a finished sequence
    workers: dict[int, _Worker] = field(default_factory=dict)  # by pool
    done: set[int] = field(default_factory=set)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    numbers: itertools.count = field(default_factory=itertools.count)
    losses: int = 0
    moves: int = 0

    def __post_init__(self) -> None:
        config = SchedulerConfig(
            page_size=PAGE, max_num_batched_tokens=24, max_num_seqs=12, num_microbatches=3, max_model_len=200
        )
        self.scheduler = Scheduler(config, {})

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.numbers), action))

    def run(self) -> None:
        while self.scheduler.has_unfinished:
            self._move()
            while (batch := self.scheduler.schedule()) is not None:
                self.at(self._duration_s(batch), lambda batch=batch: self._come_back(batch))
            for pool in self.scheduler.drained_pools:
                self.scheduler.apply(PoolLost(pool))
                del self.workers[pool]
            self.now_s, _, action = heapq.heappop(self.events)
            action()

    def join(self) -> None:
        pool, worker = next(self.numbers), _Worker(self.chance.randint(40, 90), self.chance.uniform(0.02, 0.1))
        self.workers[pool] = worker
        self.scheduler.apply(PoolJoined(pool, worker.pages, "a"))
        if self.chance.random() < 0.5:
            self.at(self.chance.expovariate(1 / 4), lambda: self._drain(pool))
        self.at(self.chance.expovariate(1 / 10), lambda: self._die(pool))

    def _drain(self, pool: int) -> None:
        if pool in self.workers and not self.workers[pool].dead:
            self.scheduler.apply(PoolDraining(pool))
            self.at(5, self.join)

    def _move(self) -> None:
        """Slots from one cache to another; a dead worker sends nothing, and one that takes nothing will be noticed."""
        for move in self.scheduler.leave_draining_pools():
            source, target = self.workers[move.source], self.workers[move.target]
            if source.dead:
                self.scheduler.replay(move.seq_id)
                continue
            self.moves += 1
            for old, new in zip(move.source_pages, move.target_pages, strict=True):
                for at in range(0 if target.dead else PAGE):
                    target.cache[new * PAGE + at] = source.cache.get(old * PAGE + at, -1)

    def _die(self, pool: int) -> None:
        """All that it had is gone at once; the engine notices after a while, and it returns as another pool later."""
        if pool in self.workers:
            self.workers[pool].dead, self.workers[pool].cache = True, {}
            self.losses += 1
            self.at(self.chance.choice([0, 8, 30]), lambda: self._notice(pool))

    def _notice(self, pool: int) -> None:
        if pool in self.workers:
            del self.workers[pool]
            self.scheduler.apply(PoolLost(pool))
            self.at(self.chance.uniform(0, 60), self.join)

    def _duration_s(self, batch: Batch) -> float:
        rows: dict[int, int] = {}
        for chunk in batch.chunks:
            rows[chunk.pool] = rows.get(chunk.pool, 0) + chunk.length
        return max(count * self.workers[pool].seconds_per_row for pool, count in rows.items())

    def _come_back(self, batch: Batch) -> None:
        """What the workers that are there have done; a dead one is waited for until it is known to be lost."""
        if any(chunk.pool in self.workers and self.workers[chunk.pool].dead for chunk in batch.chunks):
            self.at(1.0, lambda: self._come_back(batch))
            return
        lost, finished = self.scheduler.lost_in(batch.batch_id), {}
        assert lost == {chunk.seq_id for chunk in batch.chunks if chunk.pool not in self.workers}
        for chunk in batch.chunks:
            if chunk.seq_id not in lost:
                token = self._compute(chunk)
                if chunk.samples:
                    finished[chunk.seq_id] = self._push(chunk.seq_id, token)
        self.scheduler.complete(batch.batch_id, finished)

    def _compute(self, chunk: Chunk) -> int:
        """Write the chunk's tokens into the cache, and read all of them back from where the page table says."""
        slots = [chunk.pages[at // PAGE] * PAGE + at % PAGE for at in range(chunk.start + chunk.length)]
        cache = self.workers[chunk.pool].cache
        for at in range(chunk.start, chunk.start + chunk.length):
            cache[slots[at]] = self.tokens[chunk.seq_id][at]
        return _next_token([cache[slot] for slot in slots])

    def _push(self, seq_id: int, token: int) -> bool:
        assert seq_id not in self.done
        self.tokens[seq_id].append(token)
        is_done = len(self.tokens[seq_id]) == self.ends[seq_id]
        self.done |= {seq_id} if is_done else set()
        return is_done


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_those_of_an_undisturbed_run_whatever_is_lost_and_when(seed):
    chance = random.Random(seed)
    simulation = _Simulation(chance)
    expected = {}
    for seq_id in range(60):
        prompt = [chance.randrange(997) for _ in range(chance.randint(1, 60))]
        count = chance.randint(1, 50)
        simulation.tokens[seq_id], simulation.ends[seq_id] = list(prompt), len(prompt) + count
        simulation.scheduler.add(seq_id, len(prompt), count)
        expected[seq_id] = list(prompt)
        for _ in range(count):
            expected[seq_id].append(_next_token(expected[seq_id]))
    for _ in range(3):
        simulation.at(0, simulation.join)
    simulation.run()
    assert simulation.tokens == expected and len(simulation.done) == 60
    assert simulation.losses > 2 and simulation.scheduler.num_replays > 2 and simulation.moves > 1
    assert simulation.scheduler.pages_used == 0
