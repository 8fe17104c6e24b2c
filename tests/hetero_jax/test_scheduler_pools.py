"""Pools that come and go: nothing is lost, nothing doubled, no page leaks."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax import pools
from hetero_jax.errors import CapacityError
from hetero_jax.scheduler_types import Batch, SchedulerConfig
from scheduler_executor import Executor, jobs, make_config, make_executor, make_scheduler


@settings(max_examples=200, deadline=None)
@given(job=jobs(), rng=st.randoms(use_true_random=False))
@mock.patch.object(pools, "_COPY_COST", 2)  # so that short sequences move too
def test_every_sequence_finishes_whatever_joins_drains_and_is_lost(
    job: tuple[SchedulerConfig, list[int], list[tuple[int, int, int]]], rng: random.Random
) -> None:
    """Every token once, positions in order, what is seen is there, nothing new on draining pools: see the executor."""
    config, sizes, sequences = job
    formats = {number: rng.choice(["", "a", "a", "b"]) for number in range(len(sizes))}
    shares = {"families": rng.randrange(4), "num_common": rng.randrange(9)}
    executor = Executor(
        config, dict(enumerate(sizes)), formats=formats, copies=lambda move: rng.random() < 0.8, **shares
    )
    left, joined = dict(enumerate(sequences)), len(sizes)
    for _ in range(80):
        action = rng.random()
        if action < 0.2 and left:
            seq_id = min(left)
            executor.add(seq_id, *left.pop(seq_id))
        elif action < 0.5:
            executor.launch()
        elif action < 0.75 and executor.in_flight:
            executor.land(rng.choice(list(executor.in_flight)))
        elif action < 0.85:
            executor.join(joined, rng.choice(sizes), rng.choice(["", "a", "a", "b"]))
            joined += 1
        elif action < 0.88 and executor.pools:
            executor.lose(rng.choice(list(executor.pools)))
        elif action < 0.94 and executor.pools:
            executor.measure(rng.choice(list(executor.pools)), rng.uniform(0.1, 10))
        elif executor.pools:
            executor.begin_drain(rng.choice(list(executor.pools)))
        for number in executor.scheduler.drained_pools:
            executor.lose(number)
    for seq_id, request in left.items():
        executor.add(seq_id, *request)
    executor.join(joined, max(sizes))
    executor.drain(rng)
    assert executor.done == {seq_id: ends_after for seq_id, (_, _, ends_after) in enumerate(sequences)}


def test_a_sequence_must_fit_one_pool_of_those_that_were_ever_there() -> None:
    executor = make_executor(10, 20, page_size=1)
    executor.lose(1)
    executor.scheduler.check(20, 1)
    with pytest.raises(CapacityError, match="allowed: <= 20 pages"):
        executor.scheduler.check(21, 1)
    make_scheduler(page_size=1).check(21, 1)  # nobody is there yet: who knows


def test_a_lost_pool_costs_the_others_nothing() -> None:
    executor = make_executor(50, 50, page_size=1, num_microbatches=1, max_num_batched_tokens=64)
    for seq_id in range(4):
        executor.add(seq_id, prompt=5, max_tokens=3)
    first = executor.launch()
    assert first is not None
    homes = {chunk.seq_id: chunk.pool for chunk in first.chunks}
    assert sorted(homes.values()) == [0, 0, 1, 1]
    executor.lose(1)
    executor.land(first.batch_id)
    second = executor.launch()
    assert second is not None
    again = {chunk.seq_id: (chunk.start, chunk.length, chunk.pool) for chunk in second.chunks}
    assert again == {seq_id: (5, 1, 0) if home == 0 else (0, 5, 0) for seq_id, home in homes.items()}
    assert executor.scheduler.num_replays == 2
    executor.land(second.batch_id)
    executor.drain(random.Random(0))
    assert executor.done == dict.fromkeys(range(4), 3)


def test_without_a_pool_all_wait_and_one_that_returns_goes_on_with_their_tokens() -> None:
    executor = make_executor(50, page_size=1, num_microbatches=1)
    executor.add(0, prompt=5, max_tokens=4)
    for _ in range(2):
        batch = executor.launch()
        assert batch is not None
        executor.land(batch.batch_id)
    executor.lose(0)
    assert executor.launch() is None and executor.scheduler.num_waiting == 1
    executor.join(1, 50)
    batch = executor.launch()
    assert batch is not None
    assert [(c.start, c.length, c.samples) for c in batch.chunks] == [(0, 7, True)]  # the prompt and two tokens
    executor.land(batch.batch_id)
    executor.drain(random.Random(0))
    assert executor.done == {0: 4}


def test_what_no_pool_holds_any_more_lets_others_pass_until_one_joins_that_does() -> None:
    executor = make_executor(10, 40, page_size=1, num_microbatches=1)
    executor.lose(1)
    executor.add(0, prompt=30, max_tokens=2)
    executor.add(1, prompt=5, max_tokens=2)
    while (batch := executor.launch()) is not None:
        executor.land(batch.batch_id)
    assert executor.done == {1: 2} and executor.scheduler.num_waiting == 1
    executor.join(2, 31)
    executor.drain(random.Random(0))
    assert executor.done == {0: 2, 1: 2}


def test_a_draining_pool_is_left_as_soon_as_another_holds_its_sequences() -> None:
    executor = make_executor(20, page_size=1, num_microbatches=1)
    executor.add(0, prompt=5, max_tokens=10)
    executor.begin_drain(0)
    executor.add(1, prompt=5, max_tokens=10)
    assert executor.launch() is None  # nothing new
    executor = make_executor(20, page_size=1, num_microbatches=1)
    executor.add(0, prompt=5, max_tokens=10)
    for _ in range(3):  # nowhere else to go: it stays
        batch = executor.launch()
        assert batch is not None and batch.chunks[0].pool == 0
        executor.land(batch.batch_id)
        if 0 not in executor.draining:
            executor.begin_drain(0)
    assert executor.scheduler.drained_pools == []
    executor.join(1, 20)
    batch = executor.launch()
    assert batch is not None
    assert [(c.pool, c.start, c.length) for c in batch.chunks] == [(1, 0, 8)]
    assert executor.scheduler.drained_pools == [0]


def _two_pools(
    formats: str, *, pages: tuple[int, int] = (20, 20), windows: tuple[int | None, ...] = (), **config: int
) -> Executor:
    limits = make_config(*windows, page_size=2, num_microbatches=1, **config)
    return Executor(limits, dict(enumerate(pages)), formats=dict(enumerate(formats)))


def _step(executor: Executor) -> Batch:
    batch = executor.launch()
    assert batch is not None
    executor.land(batch.batch_id)
    return batch


def _chunks(batch: Batch) -> list[tuple[int, int, int]]:
    return [(chunk.pool, chunk.start, chunk.length) for chunk in batch.chunks]


def test_a_sequence_moves_with_its_pages_and_goes_on_where_it_was() -> None:
    executor = _two_pools("aa")
    executor.add(0, prompt=5, max_tokens=10)
    first = executor.launch()
    assert first is not None
    home = first.chunks[0].pool
    executor.begin_drain(home)
    assert executor.scheduler.migrate() == []  # while it is in flight its pages are written to
    executor.land(first.batch_id)
    assert _chunks(_step(executor)) == [(1 - home, 5, 1)]
    assert (executor.scheduler.num_replays, executor.scheduler.drained_pools) == (0, [home])
    assert executor.scheduler.pages_used == 3
    executor.lose(home)
    executor.drain(random.Random(0))
    assert executor.done == {0: 10}


def test_in_the_middle_of_its_prompt_it_moves_too() -> None:
    executor = _two_pools("aa", max_num_batched_tokens=8)
    executor.add(0, prompt=20, max_tokens=3)
    executor.begin_drain(_step(executor).chunks[0].pool)
    assert [(start, length) for _, start, length in _chunks(_step(executor))] == [(8, 8)]
    executor.drain(random.Random(0))
    assert executor.done == {0: 3} and executor.scheduler.num_replays == 0


def test_behind_a_window_only_the_pages_that_it_still_has_move() -> None:
    executor = _two_pools("aa", pages=(6, 6), max_num_batched_tokens=2, windows=(4,))
    executor.add(0, prompt=30, max_tokens=3)
    for _ in range(8):
        last = _step(executor)
    executor.begin_drain(last.chunks[0].pool)
    (move,) = executor.scheduler.migrate()
    assert len(move.source_pages) == 2  # of 8: positions 13, 14 and 15
    executor.scheduler.replay(0)
    executor.sequences[0].computed = 0
    executor.drain(random.Random(0))
    assert executor.done == {0: 3}


@pytest.mark.parametrize(
    ("formats", "neighbours", "arrives"),
    [("ab", 0, True), (["", ""], 0, True), ("aa", 1, True), ("aa", 0, False)],
    ids=["other kinds of pages", "kinds that do not travel", "no room", "the copy fails"],
)
def test_what_cannot_move_is_computed_again(formats: str, neighbours: int, arrives: bool) -> None:
    executor = _two_pools(formats)
    executor.copies = lambda move: arrives
    for seq_id in range(1 + neighbours):  # each in a pool of its own, of which it takes 10 pages of 20
        executor.add(seq_id, prompt=20, max_tokens=8)
    executor.begin_drain(_step(executor).chunks[0].pool)
    again = [chunk for chunk in _step(executor).chunks if chunk.seq_id == 0]
    assert [(chunk.start, chunk.length) for chunk in again] == ([] if neighbours else [(0, 21)])  # it may have to wait
    assert executor.scheduler.num_replays == 1
    executor.drain(random.Random(0))
    assert executor.done == dict.fromkeys(range(1 + neighbours), 8)
