"""An executor of the scheduler's microbatches that checks every promise, and jobs for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st

from hetero_jax.prefixes import page_keys
from hetero_jax.scheduler import Scheduler
from hetero_jax.scheduler_types import (
    Batch,
    Chunk,
    Move,
    PoolDraining,
    PoolJoined,
    PoolLost,
    PoolMeasured,
    SchedulerConfig,
)


def make_config(*windows: int | None, **changes: int) -> SchedulerConfig:
    limits = {"page_size": 16, "max_model_len": 4096}
    load = {"max_num_batched_tokens": 512, "max_num_seqs": 256, "num_microbatches": 2}
    return SchedulerConfig(windows=windows or (None,), **(limits | load | changes))


def make_scheduler(*pools: int, **config: int) -> Scheduler:
    """With pools of so many pages."""
    return Scheduler(make_config(**config), dict(enumerate(pools)))


@dataclass
class Mirror:
    """What the executor knows of one sequence."""

    prompt: tuple[int, ...]
    max_tokens: int
    ends_after: int  # tokens until it ends
    generated: int = 0
    computed: int = 0
    in_flight: bool = False


@dataclass
class Executor:
    """Runs microbatches, in any order, and checks what each of them claims about positions and pages."""

    config: SchedulerConfig
    pools: dict[int, int]  # pages by number
    scheduler: Scheduler = field(init=False)
    sequences: dict[int, Mirror] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)  # tokens generated
    in_flight: dict[int, Batch] = field(default_factory=dict)
    # pool, page, offset -> group, what was computed
    written: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)
    families: int = 0  # of prompts; those of one begin alike. 0: no prompts are shared
    num_common: int = 0  # tokens that all families begin with
    tables: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # of each group
    homes: dict[int, int] = field(default_factory=dict)  # sequence -> pool of its last chunk
    draining: set[int] = field(default_factory=set)
    formats: dict[int, str] = field(default_factory=dict)  # of pages, by pool
    speeds: dict[int, float] = field(default_factory=dict)  # of pools that were measured
    copies: Callable[[Move], bool] = lambda move: True  # whether the pages of a move arrive
    shared_positions: int = 0  # that sequences did not compute
    moves: list[Move] = field(default_factory=list)  # those from one pool that stays to another

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config, {})
        for number, num_pages in self.pools.items():
            self.scheduler.apply(PoolJoined(number, num_pages, self.formats.setdefault(number, "")))

    def add(self, seq_id: int, prompt: int, max_tokens: int, ends_after: int | None = None) -> None:
        family = 1 + seq_id % self.families if self.families else 0
        tokens = tuple([0] * min(self.num_common, prompt) + [family] * (prompt - self.num_common))
        keys = page_keys(tokens, self.config.page_size) if self.families else ()
        self.scheduler.add(seq_id, prompt, max_tokens, keys)
        self.sequences[seq_id] = Mirror(tokens, max_tokens, ends_after or max_tokens)

    def _content(self, seq_id: int, position: int) -> int:
        """What stands for the keys and values of a token: they depend on all tokens so far."""
        prompt = self.sequences[seq_id].prompt
        return hash(prompt[: position + 1] if position < len(prompt) else (seq_id, position))

    def _slot(self, chunk: Chunk, group: int, position: int) -> tuple[int, int, int]:
        page, offset = divmod(position, self.config.page_size)
        return chunk.pool, chunk.page_tables[group][page], offset

    def _check_pages(self, chunk: Chunk) -> None:
        """All that its rows see was computed and is there still, and nobody else uses what they write to."""
        for group, window in enumerate(self.config.windows):
            for position in range(self._oldest(window, chunk.start), chunk.start):
                content = group, self._content(chunk.seq_id, position)
                assert self.written.get(self._slot(chunk, group, position)) == content
        others = (other for batch in self.in_flight.values() for other in batch.chunks if other.pool == chunk.pool)
        theirs = {page for other in others for page in self._seen_pages(other)}
        ours = [page for table in chunk.page_tables for page in table[chunk.start // self.config.page_size :]]
        assert len(set(ours)) == len(ours) and not theirs.intersection(ours)

    def launch(self) -> Batch | None:
        self.move()
        before = self.scheduler.num_preemptions
        batch = self.scheduler.schedule()
        preempted = self.scheduler.num_preemptions - before
        if batch is None:
            assert preempted == 0  # pages are never taken for nothing
            return None
        assert batch.batch_id not in self.in_flight
        assert len(self.in_flight) < self.config.num_microbatches
        assert 0 < batch.num_rows == sum(c.length for c in batch.chunks) <= self.config.max_num_batched_tokens
        for chunk in batch.chunks:
            seq = self.sequences[chunk.seq_id]
            assert not seq.in_flight
            seq.in_flight = True
            whole, rest = divmod(chunk.start, self.config.page_size)
            goes_on = chunk.start == seq.computed > 0 and self._has_kept(chunk, whole)
            is_new = not goes_on or chunk.pool != self.homes[chunk.seq_id]  # one worker has the whole sequence
            if is_new:  # a residency begins with a page, behind what others have computed
                assert rest == 0 and whole * self.config.page_size < len(seq.prompt) + seq.generated
                assert chunk.start == 0 or (self.families and chunk.start <= len(seq.prompt))
                self.shared_positions += chunk.start
                seq.computed = chunk.start
                self.tables.pop(chunk.seq_id, None)
                assert chunk.pool not in self.draining
            known = len(seq.prompt) + seq.generated
            assert chunk.length >= 1 and chunk.start + chunk.length <= known
            assert chunk.samples == (chunk.start + chunk.length == known)
            assert len(chunk.page_tables) == len(self.config.windows)
            for table in chunk.page_tables:
                assert len(table) == -(-(chunk.start + chunk.length) // self.config.page_size)
                assert all(0 <= page < self.pools[chunk.pool] for page in table)
            assert is_new or self._has_kept(chunk, None)  # what is written stays where it is
            self._check_pages(chunk)
            assert len(self._seen_pages(chunk)) <= self.config.most_pages(chunk.start + chunk.length)
            self.tables[chunk.seq_id], self.homes[chunk.seq_id] = chunk.page_tables, chunk.pool
            self.in_flight[batch.batch_id] = Batch(batch.batch_id, batch.chunks[: batch.chunks.index(chunk) + 1])
        self.in_flight[batch.batch_id] = batch
        chunks = [c for b in self.in_flight.values() for c in b.chunks if c.pool in self.pools]
        flying = {(c.pool, page) for c in chunks for page in self._seen_pages(c)}
        assert len(flying) <= self.scheduler.pages_used <= self.scheduler.pages_total == sum(self.pools.values())
        assert self.scheduler.num_running <= self.config.max_num_seqs
        return batch

    def move(self) -> None:
        """Lets sequences leave draining pools, and balance the others."""
        for move in self.scheduler.migrate():
            seq_id, source, target = move.seq_id, move.source, move.target
            assert not self.sequences[seq_id].in_flight and source != target not in self.draining
            assert self.formats[source] == self.formats[target] != ""
            assert all(0 <= page < self.pools[target] for page in move.target_pages)
            assert len(set(move.source_pages)) == len(move.source_pages) == len(set(move.target_pages))
            if source not in self.draining:
                self._check_balancing(move)
            if not self.copies(move):
                self.sequences[seq_id].computed = 0
                self.scheduler.replay(seq_id)
                continue
            moved = dict(zip(move.source_pages, move.target_pages, strict=True))
            self.tables[seq_id] = tuple(
                tuple(moved.get(page, -1) for page in table) for table in self.tables.get(seq_id, ())
            )
            self.homes[seq_id] = target
            copied = {place: found for place, found in self.written.items() if place[:1] == (source,)}
            self.written |= {
                (target, moved[page], at): found for (_, page, at), found in copied.items() if page in moved
            }

    def _check_balancing(self, move: Move) -> None:
        """It was the slowest pool, and the target is not now: with a sequence more it has still a tenth less time."""
        self.moves.append(move)
        speeds = [self.speeds[pool] for pool in self.pools if pool in self.speeds]
        average = sum(speeds) / len(speeds) if speeds else 1.0
        before_s = {pool: self.load(pool) / self.speeds.get(pool, average) for pool in self.pools}
        staying = self.pools.keys() - self.draining
        assert before_s[move.source] == pytest.approx(max(before_s[pool] for pool in staying))
        reads = self._reads(self.sequences[move.seq_id])
        target_s = before_s[move.target] + reads / self.speeds.get(move.target, average)
        assert target_s <= 0.9 * before_s[move.source] + 1e-9

    def load(self, pool: int) -> int:
        """Positions that one decode row of each of its sequences attends to."""
        return sum(self._reads(self.sequences[seq_id]) for seq_id in self.residents(pool))

    def residents(self, pool: int) -> list[int]:
        """Unfinished sequences whose last chunk was there."""
        return [seq_id for seq_id, home in self.homes.items() if home == pool and seq_id in self.sequences]

    def _reads(self, seq: Mirror) -> int:
        return min(len(seq.prompt) + seq.generated, self._sees)

    def _oldest(self, window: int | None, position: int) -> int:
        """The first position that a row sees."""
        return 0 if window is None else max(0, position - window + 1)

    def _first_seen(self, chunk: Chunk) -> list[int]:
        """Of each group, the first page that a row of the chunk sees."""
        return [self._oldest(window, chunk.start) // self.config.page_size for window in self.config.windows]

    def _seen_pages(self, chunk: Chunk) -> list[int]:
        """Of all groups."""
        seen = zip(self._first_seen(chunk), chunk.page_tables, strict=True)
        return [page for first, table in seen for page in table[first:]]

    def _has_kept(self, chunk: Chunk, stop: int | None) -> bool:
        """Up to that page its tables say what the last chunk's did, for what its rows see."""
        before = self.tables.get(chunk.seq_id, ((),) * len(self.config.windows))
        return all(
            table[first : len(old)][: None if stop is None else max(0, stop - first)] == old[first:stop]
            for first, table, old in zip(self._first_seen(chunk), chunk.page_tables, before, strict=True)
        )

    def pages_needed(self) -> int:
        """Of all sequences that run: what their rows, now or next, see and write. None shares or was preempted."""
        chunks = {chunk.seq_id: chunk for batch in self.in_flight.values() for chunk in batch.chunks}
        found = 0
        for seq_id, tables in self.tables.items():
            if seq_id in self.sequences:
                start = chunks[seq_id].start if seq_id in chunks else self.sequences[seq_id].computed
                for window, table in zip(self.config.windows, tables, strict=True):
                    last = max(0, -(-start // self.config.page_size) - 1)  # which stays in any case
                    found += len(table) - min(self._oldest(window, start) // self.config.page_size, last)
        return found

    @property
    def _sees(self) -> int:
        """Most positions that a row attends to at any site."""
        return max(window or self.config.max_model_len for window in self.config.windows)

    def join(self, number: int, num_pages: int, page_format: str = "") -> None:
        self.pools[number], self.formats[number] = num_pages, page_format
        self.scheduler.apply(PoolJoined(number, num_pages, page_format))

    def lose(self, number: int) -> None:
        """The pool is gone, with all that was written there."""
        del self.pools[number]
        self.speeds.pop(number, None)
        self.draining.discard(number)
        self.scheduler.apply(PoolLost(number))
        self.written = {place: found for place, found in self.written.items() if place[0] != number}
        for seq_id, home in self.homes.items():
            if home == number and seq_id in self.sequences:
                self.sequences[seq_id].computed = 0

    def measure(self, number: int, speed: float) -> None:
        self.speeds[number] = speed
        self.scheduler.apply(PoolMeasured(number, speed))

    def begin_drain(self, number: int) -> None:
        self.draining.add(number)
        self.scheduler.apply(PoolDraining(number))

    def land(self, batch_id: int) -> None:
        finished: dict[int, bool] = {}
        chunks = self.in_flight.pop(batch_id).chunks
        lost = {chunk.seq_id for chunk in chunks if chunk.pool not in self.pools}
        assert self.scheduler.lost_in(batch_id) == lost
        for chunk in chunks:
            seq = self.sequences[chunk.seq_id]
            seq.in_flight = False
            if chunk.seq_id in lost:
                continue
            seq.computed += chunk.length
            for position in range(chunk.start, seq.computed):
                for group in range(len(self.config.windows)):
                    content = group, self._content(chunk.seq_id, position)
                    self.written[self._slot(chunk, group, position)] = content
            if chunk.samples:
                seq.generated += 1
                finished[chunk.seq_id] = seq.generated == seq.ends_after
                if finished[chunk.seq_id]:
                    self.done[chunk.seq_id] = self.sequences.pop(chunk.seq_id).generated
        self.scheduler.complete(batch_id, finished)

    def drain(self, rng: random.Random) -> int:
        """Runs all to the end; the number of microbatches that took."""
        landed = 0
        while self.scheduler.has_unfinished:
            while self.launch() is not None:
                pass
            assert self.in_flight, "nothing runs and nothing can start"
            self.land(rng.choice(list(self.in_flight)))
            landed += 1
        assert not self.in_flight and self.scheduler.schedule() is None
        assert (self.scheduler.pages_used, self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0, 0)
        assert self.scheduler.prefix_cache_hits == self.shared_positions
        return landed


def make_executor(*pools: int, windows: tuple[int | None, ...] = (), **config: int) -> Executor:
    """With pools of so many pages."""
    return Executor(make_config(*windows, **config), dict(enumerate(pools)))


@st.composite
def jobs(draw: st.DrawFn) -> tuple[SchedulerConfig, list[int], list[tuple[int, int, int]]]:
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    windows = draw(st.lists(st.one_of(st.none(), st.integers(1, 64)), min_size=1, max_size=3))
    pools = draw(st.lists(st.integers(len(windows), 12 * len(windows)), min_size=1, max_size=3))
    config = make_config(
        *windows,
        page_size=page_size,
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_num_seqs=draw(st.integers(1, 8)),
        num_microbatches=draw(st.integers(1, 4)),
        max_model_len=64,
    )
    fitting = (n for n in range(config.max_model_len, 0, -1) if config.most_pages(n) <= max(pools))
    limit = next(fitting)
    jobs: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(0, 12))):
        prompt = draw(st.integers(1, limit))
        max_tokens = draw(st.integers(1, limit - prompt + 1))
        jobs.append((prompt, max_tokens, draw(st.integers(1, max_tokens))))
    return config, pools, jobs
