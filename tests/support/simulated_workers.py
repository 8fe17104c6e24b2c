"""The scheduler under a virtual clock, with workers of several speeds that remember what was written to their pages."""

from __future__ import annotations

import heapq
import itertools
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hetero_jax.scheduler import Scheduler
from hetero_jax.scheduler_types import (
    Batch,
    Chunk,
    PoolDraining,
    PoolJoined,
    PoolLost,
    PoolMeasured,
    SchedulerConfig,
)

PAGE = 4


def next_token(context: list[int]) -> int:
    """What a model would say after these tokens."""
    return zlib.crc32(bytes(token % 251 for token in context)) % 997


@dataclass
class SimulatedWorker:
    """Pages by number, and KV positions that it attends to in a second; `told_speed` is what it seems to be."""

    pages: int
    speed: float
    told_speed: Callable[[float], float | None] = lambda speed: speed
    cache: dict[int, int] = field(default_factory=dict)  # token by slot
    dead: bool = False
    free_s: float = 0.0  # it serves one microbatch after the other


@dataclass
class Simulation:
    """An engine whose microbatches are back when their slowest worker is; losses are noticed late."""

    config: SchedulerConfig
    scheduler: Scheduler = field(init=False)
    now_s: float = 0.0
    prompts: dict[int, int] = field(default_factory=dict)  # lengths
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)  # tokens of a finished sequence
    workers: dict[int, SimulatedWorker] = field(default_factory=dict)  # by pool
    homes: dict[int, int] = field(default_factory=dict)  # pool of each unfinished sequence that has run
    done: set[int] = field(default_factory=set)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    numbers: itertools.count = field(default_factory=itertools.count)
    reads: int = 0  # positions attended to so far, by all
    moves: list[int] = field(default_factory=list)  # sequences, in order

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config, {})

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.numbers), action))

    def add(self, seq_id: int, prompt: list[int], max_tokens: int) -> None:
        self.tokens[seq_id], self.prompts[seq_id] = list(prompt), len(prompt)
        self.ends[seq_id] = len(prompt) + max_tokens
        self.scheduler.add(seq_id, len(prompt), max_tokens)

    def run(self) -> None:
        while self.scheduler.has_unfinished:
            self._move()
            while (batch := self.scheduler.schedule()) is not None:
                self._launch(batch)
            for pool in self.scheduler.drained_pools:
                self.scheduler.apply(PoolLost(pool))
                del self.workers[pool]
            self.now_s, _, action = heapq.heappop(self.events)
            action()
        assert self.scheduler.pages_used == 0

    def expected(self) -> dict[int, list[int]]:
        """Tokens of a run in which nothing happens, of each sequence alone."""
        found = {}
        for seq_id, length in self.prompts.items():
            tokens = self.tokens[seq_id][:length]
            while len(tokens) < self.ends[seq_id]:
                tokens.append(next_token(tokens))
            found[seq_id] = tokens
        return found

    def loads(self) -> Counter[int]:
        """Positions that the sequences of each pool have."""
        found: Counter[int] = Counter()
        for seq_id, pool in self.homes.items():
            found[pool] += len(self.tokens[seq_id])
        return found

    # --- what happens to workers

    def join(self, worker: SimulatedWorker) -> int:
        """The number of its pool."""
        pool = next(self.numbers)
        self.workers[pool] = worker
        self.scheduler.apply(PoolJoined(pool, worker.pages, "a"))
        return pool

    def drain(self, pool: int) -> bool:
        """False where it is gone."""
        alive = pool in self.workers and not self.workers[pool].dead
        if alive:
            self.scheduler.apply(PoolDraining(pool))
        return alive

    def die(self, pool: int) -> bool:
        """All that it had is gone at once; False where it was gone before."""
        if pool in self.workers:
            self.workers[pool].dead, self.workers[pool].cache = True, {}
        return pool in self.workers

    def notice(self, pool: int) -> bool:
        """The engine finds that it is dead; False where it had left before."""
        if pool not in self.workers:
            return False
        del self.workers[pool]
        self.scheduler.apply(PoolLost(pool))
        return True

    # --- what a microbatch does

    def _launch(self, batch: Batch) -> None:
        positions: Counter[int] = Counter()
        for chunk in batch.chunks:
            positions[chunk.pool] += chunk.start + chunk.length
            self.homes[chunk.seq_id] = chunk.pool
        back_s = self.now_s
        for pool, count in positions.items():
            worker = self.workers[pool]
            worker.free_s = max(self.now_s, worker.free_s) + count / worker.speed
            back_s = max(back_s, worker.free_s)
            self.reads += count
        self.at(back_s - self.now_s, lambda: self._come_back(batch))

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
        for pool in {chunk.pool for chunk in batch.chunks} & self.workers.keys():
            worker = self.workers[pool]
            if (speed := worker.told_speed(worker.speed)) is not None:
                self.scheduler.apply(PoolMeasured(pool, speed))
        self.scheduler.complete(batch.batch_id, finished)

    def _compute(self, chunk: Chunk) -> int:
        """Write the chunk's tokens into the cache, and read all of them back from where the page table says."""
        slots = [chunk.page_tables[0][at // PAGE] * PAGE + at % PAGE for at in range(chunk.start + chunk.length)]
        cache = self.workers[chunk.pool].cache
        for at in range(chunk.start, chunk.start + chunk.length):
            cache[slots[at]] = self.tokens[chunk.seq_id][at]
        return next_token([cache[slot] for slot in slots])

    def _push(self, seq_id: int, token: int) -> bool:
        assert seq_id not in self.done
        self.tokens[seq_id].append(token)
        is_done = len(self.tokens[seq_id]) == self.ends[seq_id]
        if is_done:
            self.done.add(seq_id)
            del self.homes[seq_id]
        return is_done

    def _move(self) -> None:
        """Slots from one cache to another; a dead worker sends nothing, and one that takes nothing will be noticed."""
        for move in self.scheduler.migrate():
            source, target = self.workers[move.source], self.workers[move.target]
            if source.dead:
                self.scheduler.replay(move.seq_id)
                continue
            self.moves.append(move.seq_id)
            self.homes[move.seq_id] = move.target
            for old, new in zip(move.source_pages, move.target_pages, strict=True):
                for at in range(0 if target.dead else PAGE):
                    target.cache[new * PAGE + at] = source.cache.get(old * PAGE + at, -1)
