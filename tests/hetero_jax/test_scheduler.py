"""The scheduler against a simulated executor that completes microbatches in random order and checks every promise."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax.errors import CapacityError, ConfigError, RequestError
from hetero_jax.pages import PageAllocator
from hetero_jax.prefixes import Prefixes
from hetero_jax.scheduler_state import Pool, ScheduledSequence
from hetero_jax.scheduler_types import SchedulerConfig
from scheduler_executor import Executor, jobs, make_config, make_executor, make_scheduler


@settings(max_examples=300, deadline=None)
@given(jobs(), st.randoms(use_true_random=False))
def test_every_sequence_finishes_whatever_the_pool(
    job: tuple[SchedulerConfig, list[int], list[tuple[int, int, int]]], rng: random.Random
) -> None:
    """Positions in order, once per residency or in a shared page, budgets kept: asserted by the executor."""
    config, pools, sequences = job
    executor = Executor(config, dict(enumerate(pools)), families=rng.randrange(4), num_common=rng.randrange(9))
    for seq_id, (prompt, max_tokens, ends_after) in enumerate(sequences):
        executor.add(seq_id, prompt, max_tokens, ends_after)
    executor.drain(rng)
    assert executor.done == {seq_id: ends_after for seq_id, (_, _, ends_after) in enumerate(sequences)}


@settings(max_examples=300, deadline=None)
@given(jobs(), st.randoms(use_true_random=False))
def test_late_arrivals_aborts_and_idle_drivers_change_nothing(
    job: tuple[SchedulerConfig, list[int], list[tuple[int, int, int]]], rng: random.Random
) -> None:
    config, pools, sequences = job
    executor = Executor(config, dict(enumerate(pools)), families=rng.randrange(4), num_common=rng.randrange(9))
    left = dict(enumerate(sequences))
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
    assert set(executor.done) == set(range(len(sequences))) - aborted


def test_single_prompt_is_prefilled_in_chunks_and_decoded() -> None:
    executor = make_executor(1000, max_num_batched_tokens=8, page_size=4)
    executor.add(7, prompt=20, max_tokens=3)
    seen: list[tuple[int, int, bool, int]] = []
    while (batch := executor.launch()) is not None:
        (chunk,) = batch.chunks
        seen.append((chunk.start, chunk.length, chunk.samples, len(chunk.page_tables[0])))
        assert executor.launch() is None  # it is in flight
        executor.land(batch.batch_id)
    assert seen == [(0, 8, False, 2), (8, 8, False, 4), (16, 4, True, 5), (20, 1, True, 6), (21, 1, True, 6)]
    assert executor.done == {7: 3} and executor.scheduler.pages_used == 0


def test_a_window_frees_pages_and_lets_a_sequence_be_longer_than_the_pool() -> None:
    executor = make_executor(5, page_size=4, max_num_batched_tokens=8, windows=(6,))
    executor.add(0, prompt=60, max_tokens=20)
    executor.drain(random.Random(0))
    assert executor.done == {0: 20} and executor.scheduler.num_preemptions == 0
    with pytest.raises(CapacityError, match="20 pages of 4 at once; allowed: <= 5"):
        make_scheduler(5, page_size=4, max_num_batched_tokens=8).check(60, 20)


def test_nothing_to_do() -> None:
    scheduler = make_scheduler(1000)
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
    executor = make_executor(10_000, num_microbatches=num_microbatches)
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
    executor = make_executor(1000, max_num_batched_tokens=32, num_microbatches=1)
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
    executor = make_executor(1000, max_num_batched_tokens=2, num_microbatches=2)
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
    executor = make_executor(1000, max_num_seqs=2, num_microbatches=1)
    executor.add(0, prompt=3, max_tokens=1)
    executor.add(1, prompt=3, max_tokens=9)
    executor.add(2, prompt=3, max_tokens=9)
    first = executor.launch()
    assert first is not None and [c.seq_id for c in first.chunks] == [0, 1]
    executor.land(first.batch_id)
    second = executor.launch()
    assert second is not None and [c.seq_id for c in second.chunks] == [1, 2]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    executor = make_executor(6, page_size=4, num_microbatches=1, max_num_batched_tokens=64)
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
    executor = make_executor(9, page_size=4, num_microbatches=1)
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
    executor = make_executor(20, page_size=4, max_num_batched_tokens=16)
    executor.add(0, prompt=48, max_tokens=4)
    executor.add(1, prompt=48, max_tokens=4)
    assert executor.launch() is not None
    assert executor.launch() is None
    executor.drain(random.Random(0))
    assert executor.scheduler.num_preemptions == 0 and set(executor.done) == {0, 1}


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(4, page_size=16, max_model_len=100)
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
        make_config(page_size=0)


def test_ten_thousand_prompts_in_a_pool_far_too_small() -> None:
    rng = random.Random(3)
    executor = make_executor(60, page_size=16, max_num_seqs=64, max_num_batched_tokens=256)
    for seq_id in range(10_000):
        executor.add(seq_id, rng.randint(1, 60), rng.randint(1, 6))
    executor.drain(rng)
    assert len(executor.done) == 10_000


def test_cost_of_a_step_does_not_grow_with_the_queue() -> None:
    def seconds_per_step(num_waiting: int) -> float:
        scheduler = make_scheduler(1000, max_num_seqs=64)
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


def _one_family(*pools: int, **config: int) -> Executor:
    return Executor(make_config(**config), dict(enumerate(pools)), families=1)


def test_samples_wait_for_the_first_one_and_share_its_pages() -> None:
    executor = _one_family(100, page_size=4, max_num_batched_tokens=8, num_microbatches=2)
    for seq_id in range(3):
        executor.add(seq_id, prompt=18, max_tokens=2)
    starts: list[tuple[int, int, int]] = []
    while executor.scheduler.has_unfinished:
        while (batch := executor.launch()) is not None:
            starts += [(chunk.seq_id, chunk.start, chunk.length) for chunk in batch.chunks]
        executor.land(min(executor.in_flight))
    assert starts[:2] == [(0, 0, 8), (0, 8, 8)]
    assert {(seq_id, start) for seq_id, start, _ in starts if seq_id} == {(1, 16), (1, 18), (2, 16), (2, 18)}
    assert executor.shared_positions == 32 and executor.done == {0: 2, 1: 2, 2: 2}


def test_those_behind_go_first_while_a_beginning_is_computed() -> None:
    executor = make_executor(100, page_size=4, max_num_batched_tokens=8, num_microbatches=1)
    executor.families = 2
    for seq_id in (0, 2, 1):  # the first two are of one family
        executor.add(seq_id, prompt=6, max_tokens=1)
    batch = executor.launch()
    assert batch is not None and [(c.seq_id, c.length) for c in batch.chunks] == [(0, 6), (1, 2)]
    executor.land(batch.batch_id)
    batch = executor.launch()
    assert batch is not None and [(c.seq_id, c.start) for c in batch.chunks] == [(1, 2), (2, 4)]
    executor.land(batch.batch_id)
    assert set(executor.done) == {0, 1, 2}


def test_whoever_waits_for_a_beginning_goes_on_where_its_computation_ends() -> None:
    executor = _one_family(100, page_size=4, max_num_batched_tokens=4)
    for seq_id in range(2):
        executor.add(seq_id, prompt=12, max_tokens=2)
    batch = executor.launch()
    assert batch is not None and executor.launch() is None
    executor.land(batch.batch_id)
    executor.scheduler.abort(0)
    del executor.sequences[0]
    executor.drain(random.Random(0))
    assert executor.done == {1: 2} and executor.shared_positions == 4


def test_what_sequences_free_together_counts_pages_that_nobody_else_has() -> None:
    pool = Pool(0, PageAllocator(9), Prefixes())
    first, second, third = (ScheduledSequence(seq_id, seq_id, 1, 2, 64) for seq_id in range(3))
    for seq, pages in ((first, [0, 1, 2]), (second, [0, 1, 3]), (third, [0, 4])):
        seq.enter(pool, [0])
        seq.grow(pages)
    pool.pages.allocate(5)
    pool.pages.share([0, 0, 1])
    assert [pool.freed_by(some) for some in ([], [first], [first, second], [first, second, third])] == [0, 1, 3, 5]
