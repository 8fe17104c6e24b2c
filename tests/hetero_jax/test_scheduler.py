"""The scheduler against a simulated executor that completes microbatches in random order and checks every promise."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax.errors import CapacityError, ConfigError, RequestError
from hetero_jax.scheduler import Batch, Chunk, Scheduler, SchedulerConfig


def _config(window: int | None = None, pool_pages: tuple[int, ...] = (), **changes: int) -> SchedulerConfig:
    limits = {"num_pages": 1000, "page_size": 16, "max_model_len": 4096}
    load = {"max_num_batched_tokens": 512, "max_num_seqs": 256, "num_microbatches": 2}
    return SchedulerConfig(window=window, pool_pages=pool_pages, **(limits | load | changes))


@dataclass
class _Mirror:
    """What the executor knows of one sequence."""

    prompt: int
    max_tokens: int
    ends_after: int  # tokens until it ends
    generated: int = 0
    computed: int = 0
    in_flight: bool = False


@dataclass
class _Executor:
    """Runs microbatches, in any order, and checks what each of them claims about positions and pages."""

    config: SchedulerConfig
    scheduler: Scheduler = field(init=False)
    sequences: dict[int, _Mirror] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)  # tokens generated
    in_flight: dict[int, Batch] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)  # page -> sequence that wrote to it last
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)

    def add(self, seq_id: int, prompt: int, max_tokens: int, ends_after: int | None = None) -> None:
        self.scheduler.add(seq_id, prompt, max_tokens)
        self.sequences[seq_id] = _Mirror(prompt, max_tokens, ends_after or max_tokens)

    def launch(self) -> Batch | None:
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
            if chunk.start != seq.computed:  # only a new residency starts anywhere but where the last chunk ended
                assert chunk.start == 0
                seq.computed = 0
                self.tables.pop(chunk.seq_id, None)
            known = seq.prompt + seq.generated
            assert chunk.length >= 1 and chunk.start + chunk.length <= known
            assert chunk.samples == (chunk.start + chunk.length == known)
            assert len(chunk.pages) == -(-(chunk.start + chunk.length) // self.config.page_size)
            table = self.tables.get(chunk.seq_id, ())
            assert all(0 <= page < self.config.num_pages for page in chunk.pages)
            assert len({self._pool_of(page) for page in chunk.pages}) == 1  # one worker has the whole sequence
            seen = self._first_seen(chunk)
            if chunk.start:
                assert chunk.pages[seen : len(table)] == table[seen:]  # what is written stays where it is
                written = table[seen : -(-chunk.start // self.config.page_size)]
                assert all(self.owner[page] == chunk.seq_id for page in written)  # nobody else has written there
            assert len(chunk.pages) - seen <= self.config.most_pages(chunk.start + chunk.length)
            self.tables[chunk.seq_id] = chunk.pages
            self.owner.update(dict.fromkeys(chunk.pages[seen:], chunk.seq_id))
        self.in_flight[batch.batch_id] = batch
        flying = [page for b in self.in_flight.values() for c in b.chunks for page in c.pages[self._first_seen(c) :]]
        assert len(flying) == len(set(flying))
        assert len(flying) <= self.scheduler.pages_used <= self.config.num_pages
        assert self.scheduler.num_running <= self.config.max_num_seqs
        return batch

    def _pool_of(self, page: int) -> int:
        return sum(page >= end for end in accumulate(self.config.pools))

    def _first_seen(self, chunk: Chunk) -> int:
        """The first page that a row of the chunk sees."""
        window = self.config.window or self.config.max_model_len
        return max(0, chunk.start - window + 1) // self.config.page_size

    def land(self, batch_id: int) -> None:
        finished: dict[int, bool] = {}
        for chunk in self.in_flight.pop(batch_id).chunks:
            seq = self.sequences[chunk.seq_id]
            seq.in_flight = False
            seq.computed += chunk.length
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
        return landed


@st.composite
def _jobs(draw: st.DrawFn) -> tuple[SchedulerConfig, list[tuple[int, int, int]]]:
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    pools = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    config = _config(
        num_pages=sum(pools),
        pool_pages=pools,
        page_size=page_size,
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_num_seqs=draw(st.integers(1, 8)),
        num_microbatches=draw(st.integers(1, 4)),
        max_model_len=64,
        window=draw(st.one_of(st.none(), st.integers(1, 64))),
    )
    fitting = (n for n in range(config.max_model_len, 0, -1) if config.most_pages(n) <= max(pools))
    limit = next(fitting)
    jobs: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(0, 12))):
        prompt = draw(st.integers(1, limit))
        max_tokens = draw(st.integers(1, limit - prompt + 1))
        jobs.append((prompt, max_tokens, draw(st.integers(1, max_tokens))))
    return config, jobs


@settings(max_examples=300, deadline=None)
@given(_jobs(), st.randoms(use_true_random=False))
def test_every_sequence_finishes_whatever_the_pool(
    job: tuple[SchedulerConfig, list[tuple[int, int, int]]], rng: random.Random
) -> None:
    """Positions in order and once per residency, pages never shared, budgets kept: asserted by the executor."""
    config, jobs = job
    executor = _Executor(config)
    for seq_id, (prompt, max_tokens, ends_after) in enumerate(jobs):
        executor.add(seq_id, prompt, max_tokens, ends_after)
    executor.drain(rng)
    assert executor.done == {seq_id: ends_after for seq_id, (_, _, ends_after) in enumerate(jobs)}


@settings(max_examples=300, deadline=None)
@given(_jobs(), st.randoms(use_true_random=False))
def test_late_arrivals_aborts_and_idle_drivers_change_nothing(
    job: tuple[SchedulerConfig, list[tuple[int, int, int]]], rng: random.Random
) -> None:
    config, jobs = job
    executor = _Executor(config)
    left = dict(enumerate(jobs))
    aborted: set[int] = set()
    for _ in range(60):
        action = rng.random()
        if action < 0.3 and left:
            seq_id = min(left)
            executor.add(seq_id, *left.pop(seq_id))
        elif action < 0.6:
            executor.launch()
        elif action < 0.9 and executor.in_flight:
            executor.land(rng.choice(list(executor.in_flight)))
        elif executor.sequences:
            seq_id = rng.choice(list(executor.sequences))
            executor.scheduler.abort(seq_id)
            executor.scheduler.abort(seq_id)  # the second one finds nothing to do
            aborted.add(seq_id)
            executor.sequences[seq_id].ends_after = -1
            if not executor.sequences[seq_id].in_flight:
                del executor.sequences[seq_id]
    for seq_id, request in left.items():
        executor.add(seq_id, *request)
    executor.drain(rng)
    assert set(executor.done) == set(range(len(jobs))) - aborted


def test_single_prompt_is_prefilled_in_chunks_and_decoded() -> None:
    executor = _Executor(_config(max_num_batched_tokens=8, page_size=4))
    executor.add(7, prompt=20, max_tokens=3)
    seen: list[tuple[int, int, bool, int]] = []
    while (batch := executor.launch()) is not None:
        (chunk,) = batch.chunks
        seen.append((chunk.start, chunk.length, chunk.samples, len(chunk.pages)))
        assert executor.launch() is None  # it is in flight
        executor.land(batch.batch_id)
    assert seen == [(0, 8, False, 2), (8, 8, False, 4), (16, 4, True, 5), (20, 1, True, 6), (21, 1, True, 6)]
    assert executor.done == {7: 3} and executor.scheduler.pages_used == 0


def test_a_window_frees_pages_and_lets_a_sequence_be_longer_than_the_pool() -> None:
    executor = _Executor(_config(num_pages=5, page_size=4, max_num_batched_tokens=8, window=6))
    executor.add(0, prompt=60, max_tokens=20)
    executor.drain(random.Random(0))
    assert executor.done == {0: 20} and executor.scheduler.num_preemptions == 0
    with pytest.raises(CapacityError, match="20 pages of 4 at once; allowed: <= 5"):
        Scheduler(_config(num_pages=5, page_size=4, max_num_batched_tokens=8)).check(60, 20)


def test_nothing_to_do() -> None:
    scheduler = Scheduler(_config())
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.pages_used, scheduler.pages_total) == (
        0,
        0,
        0,
        1000,
    )
    scheduler.abort(3)
    assert not scheduler.has_unfinished


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 5, 64, 65, 300])
@pytest.mark.parametrize("num_microbatches", [2, 3, 4])
def test_microbatches_stay_in_flight_and_even(num_sequences: int, num_microbatches: int) -> None:
    """With memory enough, as many microbatches fly as there are sequences for, from the first launch to the last."""
    executor = _Executor(_config(num_pages=10_000, num_microbatches=num_microbatches))
    for seq_id in range(num_sequences):
        executor.add(seq_id, prompt=5 + seq_id % 3, max_tokens=6 + seq_id % 7)
    rng = random.Random(num_sequences)
    alive_at_launch: dict[int, int] = {}
    while executor.scheduler.has_unfinished:
        alive = min(len(executor.sequences), 256)
        while (batch := executor.launch()) is not None:
            assert len(batch.chunks) <= -(-alive // num_microbatches)
            alive_at_launch[batch.batch_id] = alive
        flying = executor.in_flight
        in_flight = sum(len(batch.chunks) for batch in flying.values())
        assert len(flying) == num_microbatches or in_flight == alive  # nobody idles while a microbatch is free
        if all(alive_at_launch[batch_id] == alive for batch_id in flying):  # else: not yet even again
            assert len(flying) == min(num_microbatches, alive)
        executor.land(rng.choice(list(flying)))
    assert len(executor.done) == num_sequences


def test_decode_rows_come_first_and_prefill_fills_the_budget() -> None:
    executor = _Executor(_config(max_num_batched_tokens=32, num_microbatches=1))
    for seq_id in range(3):
        executor.add(seq_id, prompt=4, max_tokens=50)
    first = executor.launch()
    assert first is not None
    executor.land(first.batch_id)
    executor.add(3, prompt=100, max_tokens=5)
    batch = executor.launch()
    assert batch is not None
    assert [(c.seq_id, c.length, c.samples) for c in batch.chunks] == [
        (0, 1, True),
        (1, 1, True),
        (2, 1, True),
        (3, 29, False),
    ]


def test_least_recently_stepped_first() -> None:
    """More decode rows than budget: they take turns, whatever the order of arrival."""
    executor = _Executor(_config(max_num_batched_tokens=2, num_microbatches=2))
    for seq_id in range(3):
        executor.add(seq_id, prompt=1, max_tokens=400)
    stepped: list[int] = []
    for _ in range(34):
        batch = executor.launch()
        assert batch is not None
        stepped.extend(chunk.seq_id for chunk in batch.chunks)
        executor.land(batch.batch_id)
    assert all(set(stepped[i : i + 3]) == {0, 1, 2} for i in range(4, len(stepped) - 2))


def test_a_finished_place_is_taken_at_the_next_step() -> None:
    executor = _Executor(_config(max_num_seqs=2, num_microbatches=1))
    executor.add(0, prompt=3, max_tokens=1)
    executor.add(1, prompt=3, max_tokens=9)
    executor.add(2, prompt=3, max_tokens=9)
    first = executor.launch()
    assert first is not None and [c.seq_id for c in first.chunks] == [0, 1]
    executor.land(first.batch_id)
    second = executor.launch()
    assert second is not None and [c.seq_id for c in second.chunks] == [1, 2]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    executor = _Executor(_config(num_pages=6, page_size=4, num_microbatches=1, max_num_batched_tokens=64))
    executor.add(0, prompt=8, max_tokens=17)  # 24 positions: in the end the whole pool
    executor.add(1, prompt=8, max_tokens=8)
    executor.add(2, prompt=4, max_tokens=2)
    restarts: list[tuple[int, int]] = []
    finished_when_restarted: list[set[int]] = []
    while (batch := executor.launch()) is not None:
        for chunk in batch.chunks:
            mirror = executor.sequences[chunk.seq_id]
            if chunk.start == 0 and mirror.generated:
                restarts.append((chunk.seq_id, chunk.length))
                finished_when_restarted.append(set(executor.done))
        executor.land(batch.batch_id)
    assert executor.scheduler.num_preemptions == len(restarts) == 1
    assert restarts[0][0] == 1 and restarts[0][1] > 8  # prompt + tokens so far in one chunk
    assert executor.done == {0: 17, 1: 8, 2: 2}
    assert finished_when_restarted == [{0}]  # ahead of sequence 2, which arrived later


def test_admission_leaves_each_running_sequence_a_page() -> None:
    executor = _Executor(_config(num_pages=9, page_size=4, num_microbatches=1))
    for seq_id in range(4):
        executor.add(seq_id, prompt=8, max_tokens=4)
    batch = executor.launch()
    assert batch is not None
    assert [c.seq_id for c in batch.chunks] == [0, 1, 2]  # a fourth would leave 1 page for 3 sequences
    executor.land(batch.batch_id)
    executor.drain(random.Random(0))
    assert executor.scheduler.num_preemptions == 0


def test_a_long_prompt_is_not_started_where_it_cannot_end() -> None:
    """Its first chunk has pages, the whole prompt has not: starting it would only be thrown away."""
    executor = _Executor(_config(num_pages=20, page_size=4, max_num_batched_tokens=16))
    executor.add(0, prompt=48, max_tokens=4)
    executor.add(1, prompt=48, max_tokens=4)
    assert executor.launch() is not None
    assert executor.launch() is None
    executor.drain(random.Random(0))
    assert executor.scheduler.num_preemptions == 0 and set(executor.done) == {0, 1}


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(_config(num_pages=4, page_size=16, max_model_len=100))
    scheduler.add(0, 60, 5)  # 64 positions
    with pytest.raises(
        CapacityError, match=r"65 KV positions, 5 pages of 16 at once; allowed: <= 4 pages \(the whole pool"
    ):
        scheduler.add(1, 60, 6)
    with pytest.raises(CapacityError, match=r"101 KV positions; allowed: <= 100 \(max_model_len\)"):
        scheduler.add(2, 2, 100)
    with pytest.raises(RequestError, match="prompt tokens=0"):
        scheduler.add(3, 0, 1)
    assert scheduler.num_waiting == 1
    with pytest.raises(ConfigError, match="page_size=0"):
        _config(page_size=0)


def test_ten_thousand_prompts_in_a_pool_far_too_small() -> None:
    rng = random.Random(3)
    executor = _Executor(_config(num_pages=60, page_size=16, max_num_seqs=64, max_num_batched_tokens=256))
    for seq_id in range(10_000):
        executor.add(seq_id, rng.randint(1, 60), rng.randint(1, 6))
    executor.drain(rng)
    assert len(executor.done) == 10_000


def test_cost_of_a_step_does_not_grow_with_the_queue() -> None:
    def seconds_per_step(num_waiting: int) -> float:
        scheduler = Scheduler(_config(max_num_seqs=64))
        for seq_id in range(num_waiting):
            scheduler.add(seq_id, 20, 200)
        start_s = time.process_time()
        for _ in range(300):
            batch = scheduler.schedule()
            assert batch is not None
            scheduler.complete(batch.batch_id, {})
            scheduler.abort(num_waiting - 1)
        return (time.process_time() - start_s) / 300

    few = min(seconds_per_step(300) for _ in range(3))
    assert seconds_per_step(200_000) < 5 * few + 1e-4


def test_sequences_spread_over_pools_by_the_pages_left() -> None:
    executor = _Executor(_config(num_pages=30, pool_pages=(10, 20), page_size=1, num_microbatches=1))
    for seq_id in range(6):
        executor.add(seq_id, 2, 1)
    batch = executor.launch()
    assert batch is not None
    pools = [executor._pool_of(chunk.pages[0]) for chunk in batch.chunks]
    assert sorted(pools) == [0, 1, 1, 1, 1, 1]


def test_a_sequence_must_fit_one_pool() -> None:
    scheduler = Scheduler(_config(num_pages=30, pool_pages=(10, 20), page_size=1))
    scheduler.check(20, 1)
    with pytest.raises(CapacityError, match="allowed: <= 20 pages"):
        scheduler.check(21, 1)
    with pytest.raises(ConfigError, match="pool_pages"):
        _config(num_pages=30, pool_pages=(10, 10))
