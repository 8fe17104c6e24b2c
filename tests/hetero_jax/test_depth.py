"""How many microbatches are in flight, and which goes on first."""

from __future__ import annotations

import random

import pytest

from hetero_jax.depth import CallTimes, DepthRule, depth_for
from hetero_jax.walk import Wait, choose


@pytest.mark.parametrize(
    ("tier1_s", "away_s", "depth"),
    [(1.0, 1.0, 2), (1.0, 1.01, 3), (1.0, 4.0, 5), (0.004, 0.041, 12), (1.0, 0.1, 2), (1.0, 0.0, 2), (1e-3, 9.0, 32)],
)
def test_the_rule(tier1_s, away_s, depth):
    assert depth_for(tier1_s=tier1_s, away_s=away_s) == depth


def test_the_least_time_on_the_wire_counts_of_calls_that_found_the_worker_idle():
    times = CallTimes()
    assert (times.wire_s, times.tier2_s) == (0.0, 0.0)
    clock_ns = 5_000_000_000
    for wire_ms, queued in [(9, False), (4, False), (1, True), (6, False)]:  # each takes 3 ms there
        began_ns = clock_ns if queued else clock_ns + 50_000_000
        clock_ns = began_ns + 3_000_000
        times.observe(trip_s=(wire_ms + 3) / 1e3, began_ns=began_ns, ended_ns=clock_ns)
    assert times.wire_s == pytest.approx(0.004)
    assert times.tier2_s == pytest.approx(0.003)


def test_bytes_take_what_is_left_of_the_wire_besides_its_latency():
    times = CallTimes()
    assert times.transfer_s(10**6) == 0.0  # not known yet
    for wire_ms, num_bytes in [(30, 10**6), (24, 2 * 10**6), (6, 0)]:  # the last one's went meanwhile
        began_ns = 50_000_000 * num_bytes
        times.observe(
            trip_s=(wire_ms + 3) / 1e3,
            began_ns=began_ns,
            ended_ns=began_ns + 3_000_000,
            num_bytes=num_bytes,
            latency_s=0.020,
        )
    assert times.transfer_s(500_000) == pytest.approx(1e-3)  # 4 ms for 2 MB


def test_a_pipeline_finds_its_depth_and_follows_a_wire_that_changes():
    """A simulated one: a stage takes tier 1 a part that is fixed and one by rows, and so does tier 2."""
    rule, seen = DepthRule(), []
    for turn in range(400):
        rows, wire_s = 64 / rule.depth, 0.020 if turn < 200 else 0.002
        rule.observe(tier1_s=2e-3 + 2e-5 * rows, away_s=wire_s + 1e-3 + 5e-5 * rows)
        seen.append(rule.depth)
    # 64 / 11 rows: 2.12 ms on tier 1 and 21.29 ms away, 10.05 times as much; at 12: 10.1
    assert set(seen[150:200]) == {12}
    # 64 / 3 rows: 2.43 and 4.07 ms, 1.7 times as much
    assert set(seen[-50:]) == {3}


def test_waits_for_what_another_microbatch_began_count_as_the_time_of_both():
    rule = DepthRule()
    for turn in range(200):
        rule.observe(tier1_s=1e-3 if turn % 4 else 17e-3, away_s=0.045)  # 5 ms each
    assert rule.depth == 10


def test_the_deepest_goes_first_of_those_that_need_not_wait():
    def wait(stage: int, for_tier1: bool, ready: bool) -> Wait:
        return Wait(stage, for_tier1, lambda: ready)

    waits = {3: wait(2, False, True), 4: wait(5, False, False), 5: wait(4, True, True), 6: wait(4, False, True)}
    assert choose(waits, "deepest") == 5
    assert choose(waits, "oldest") == 3
    waiting = {3: wait(2, False, False), 4: wait(1, True, False), 5: wait(9, True, False)}
    assert choose(waiting, "deepest") == 4  # what tier 1 computes is needed first
    # Workers answer in the order of the calls: the first here has waited longest, whatever its number and depth.
    assert choose({4: wait(2, False, False), 3: wait(5, False, False)}, "deepest") == 4
    assert choose({3: wait(5, False, False), 4: wait(2, False, False)}, "deepest") == 3


@pytest.mark.parametrize("order", ["deepest", "oldest"])
def test_none_starves(order):
    chance, stages, in_flight, started, ended = random.Random(0), 6, {}, 0, {}
    for turn in range(3000):
        while len(in_flight) < 5:
            in_flight[started] = [0, turn]
            started += 1
        waits = {
            number: Wait(stage, bool(stage % 2), lambda there=turn >= at: there)
            for number, (stage, at) in in_flight.items()
        }
        number = choose(waits, order)
        stage = in_flight[number][0] + 1
        in_flight[number] = [stage, turn + chance.randrange(12)]
        if stage == stages:
            del in_flight[number]
            ended[number] = turn
    assert max(abs(place - number) for place, number in enumerate(ended)) < 20  # in order, nearly
