"""Which pool a sequence runs in: in proportion to speed, as far as pages allow; and moves that come to an end."""

from __future__ import annotations

import itertools
import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax import pools
from scheduler_executor import Executor, make_config, make_executor

SPEEDS = st.lists(st.floats(1, 10), min_size=2, max_size=5)


def _executor(*speeds: float | None, pages: int = 2000, **config: int) -> Executor:
    """With a pool of each speed; None: not measured."""
    limits = make_config(page_size=4, num_microbatches=1, max_num_batched_tokens=1 << 16, **config)
    executor = Executor(
        limits, dict.fromkeys(range(len(speeds)), pages), formats=dict.fromkeys(range(len(speeds)), "a")
    )
    for number, speed in enumerate(speeds):
        if speed is not None:
            executor.measure(number, speed)
    return executor


def _step(executor: Executor) -> None:
    batch = executor.launch()
    assert batch is not None
    executor.land(batch.batch_id)


def _loads(executor: Executor) -> list[int]:
    return [executor.load(pool) for pool in executor.pools]


@settings(max_examples=60, deadline=None)
@given(SPEEDS, st.lists(st.integers(1, 60), min_size=1, max_size=80))
def test_the_slowest_pool_takes_no_longer_than_an_ideal_split_and_one_sequence(speeds: list[float], prompts: list[int]):
    """The bound of greedy scheduling on uniform machines: every pool would have taken the slowest one's last."""
    executor = _executor(*speeds)
    for seq_id, prompt in enumerate(prompts):
        executor.add(seq_id, prompt, max_tokens=2)
    batch = executor.launch()
    assert batch is not None and len(batch.chunks) == len(prompts)
    slowest_s = max(load / speed for load, speed in zip(_loads(executor), speeds, strict=True))
    assert slowest_s <= (sum(prompts) + len(speeds) * max(prompts)) / sum(speeds) + 1e-9


def test_loads_are_in_proportion_to_speeds_and_unmeasured_pools_count_as_the_average():
    executor = _executor(1.0, 3.0, None)
    for seq_id in range(120):
        executor.add(seq_id, prompt=10, max_tokens=2)
    executor.launch()
    assert _loads(executor) == [200, 600, 400]


def test_what_a_pool_has_no_pages_for_goes_to_the_others():
    executor = make_executor(12, 1000, page_size=1, num_microbatches=1)
    executor.measure(0, 100.0)
    executor.measure(1, 1.0)
    for seq_id in range(6):
        executor.add(seq_id, prompt=3, max_tokens=1)
    executor.launch()
    assert _loads(executor) == [9, 9]  # the fast one keeps a page for each to open


def test_a_row_of_a_model_with_windows_attends_to_no_more():
    executor = Executor(make_config(8, num_microbatches=1), {0: 100, 1: 100})
    executor.add(0, prompt=80, max_tokens=2)
    for seq_id in range(1, 4):
        executor.add(seq_id, prompt=8, max_tokens=2)
    executor.launch()
    assert _loads(executor) == [16, 16]


def test_a_pool_that_joins_gets_running_sequences_with_most_tokens_to_come():
    executor = _executor(1.0)
    for seq_id in range(10):
        executor.add(seq_id, prompt=20, max_tokens=500 + seq_id)
    for _ in range(3):
        _step(executor)
    executor.join(1, 2000, "a")
    for _ in range(10):
        _step(executor)
    assert [move.seq_id for move in executor.moves] == [9, 8, 7, 6, 5]
    assert executor.scheduler.num_replays == executor.scheduler.num_preemptions == 0
    executor.drain(random.Random(0))
    assert len(executor.moves) == 5


def test_a_pool_that_became_slow_is_relieved():
    executor = _executor(2.0, 2.0)
    for seq_id in range(20):
        executor.add(seq_id, prompt=20, max_tokens=500)
    _step(executor)
    executor.measure(0, 0.5)
    for _ in range(20):
        _step(executor)
    assert [len(executor.residents(pool)) for pool in (0, 1)] == [4, 16]
    assert {(move.source, move.target) for move in executor.moves} == {(0, 1)}


@pytest.mark.parametrize(
    ("formats", "pages", "max_tokens", "waiting", "why"),
    [
        ("ab", 2000, 500, 0, "pages of another kind"),
        (("", ""), 2000, 500, 0, "pages that do not travel"),
        ("aa", 100, 500, 0, "no room for all that it may become"),
        ("aa", 2000, 70, 0, "too few tokens to come"),
        ("aa", 2000, 500, 1, "one waits that can start"),
    ],
)
def test_none_moves_where_it_does_not_pay(formats, pages, max_tokens, waiting, why):
    executor = Executor(make_config(page_size=4, num_microbatches=2), {0: 2000}, formats={0: formats[0]})
    for seq_id in range(10):
        executor.add(seq_id, prompt=20, max_tokens=max_tokens)
    for _ in range(3):
        _step(executor)
    executor.join(1, pages, formats[1])
    for seq_id in range(waiting):
        executor.add(100 + seq_id, prompt=20, max_tokens=2)
    executor.move()
    assert executor.moves == [], why


def test_who_waits_for_a_place_among_the_running_keeps_nobody_from_moving():
    executor = _executor(1.0, max_num_seqs=10)
    for seq_id in range(11):
        executor.add(seq_id, prompt=20, max_tokens=500)
    _step(executor)
    executor.join(1, 2000, "a")
    executor.move()
    assert len(executor.moves) == 1 and executor.scheduler.num_waiting == 1


@settings(max_examples=50, deadline=None)
@given(SPEEDS, st.lists(st.tuples(st.integers(1, 60), st.integers(2, 300)), min_size=1, max_size=40))
def test_with_loads_as_they_are_moves_come_to_an_end(speeds: list[float], sequences: list[tuple[int, int]]):
    """Even if copies cost nothing and nobody has to stay; the executor checks that each gains a tenth."""
    executor = _executor(1.0)
    for seq_id, (prompt, max_tokens) in enumerate(sequences):
        executor.add(seq_id, prompt, max_tokens)
    _step(executor)
    for number, speed in enumerate(speeds, 1):
        executor.join(number, 2000, "a")
        executor.measure(number, speed)
    with mock.patch.object(pools, "_COPY_COST", 0):
        slowest_s = [max(map(lambda load, speed: load / speed, _loads(executor), [1.0, *speeds]))]
        for _ in range(20 * len(sequences)):
            before = len(executor.moves)
            executor.move()
            slowest_s.append(max(map(lambda load, speed: load / speed, _loads(executor), [1.0, *speeds])))
            if len(executor.moves) == before:
                break
        else:
            pytest.fail("it does not end")
    assert slowest_s == sorted(slowest_s, reverse=True)
    times_s = {pool: executor.load(pool) / speed for pool, speed in enumerate([1.0, *speeds])}
    slowest = max(times_s, key=times_s.__getitem__)
    smallest = min(sum(sequences[seq_id][:1]) + 1 for seq_id in executor.residents(slowest))
    # What is left out of balance is a tenth, and what one sequence makes.
    assert all(
        executor.load(pool) + smallest > 0.9 * times_s[slowest] * speed - 1e-6
        for pool, speed in enumerate([1.0, *speeds])
        if pool != slowest
    )
    executor.drain(random.Random(0))
    assert len(executor.done) == len(sequences)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 10), st.floats(0.95, 1.05), st.floats(0.95, 1.05)), min_size=2, max_size=4),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
)
def test_none_goes_right_back_because_speeds_are_measured_a_little_wrong(
    measured: list[tuple[float, float, float]], prompts: list[int]
):
    executor = _executor(1.0)
    for seq_id, prompt in enumerate(prompts):
        executor.add(seq_id, prompt, max_tokens=500)
    _step(executor)
    for number in range(1, len(measured)):
        executor.join(number, 2000, "a")
    with mock.patch.object(pools, "_COPY_COST", 0):
        for turn in range(40):
            for number, (speed, even, odd) in enumerate(measured):
                executor.measure(number, speed * (odd if turn % 2 else even))
            executor.move()
    for one, other in itertools.pairwise(executor.moves):
        assert (one.seq_id, one.source) != (other.seq_id, other.target)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_who_moved_stays_for_64_tokens_whatever_speeds_are_told(seed: int, prompts: list[int]):
    chance = random.Random(seed)
    executor = _executor(1.0, 1.0, 1.0)
    for seq_id, prompt in enumerate(prompts):
        executor.add(seq_id, prompt, max_tokens=400)
    at: dict[int, list[int]] = {}
    for turn in range(300):
        for number in executor.pools:
            executor.measure(number, 10 ** chance.uniform(-2, 2))
        before = len(executor.moves)
        _step(executor)
        for move in executor.moves[before:]:
            at.setdefault(move.seq_id, []).append(turn)
    assert all(later - earlier >= 64 for turns in at.values() for earlier, later in itertools.pairwise(turns))
    executor.drain(chance)
    assert executor.done == dict.fromkeys(range(len(prompts)), 400)
