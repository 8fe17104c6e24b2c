"""The speed of a worker, of calls whose time is made up of parts that are known."""

from __future__ import annotations

import random

import pytest

from hetero_jax.rows import pack
from hetero_jax.scheduler_types import Batch, Chunk
from hetero_jax.speed import SpeedMeter

SITES = 3


def _layout(*chunks: tuple[int, int]):
    """Of chunks (start, length)."""
    parts = [
        Chunk(number, start, length, True, (tuple(range(-(-(start + length) // 16))),))
        for number, (start, length) in enumerate(chunks)
    ]
    batch = Batch(0, tuple(parts))
    return pack(batch, lambda seq_id, start, length: [0] * length, page_size=16).layout


def _run(meter: SpeedMeter, call_s: float, *chunks: tuple[int, int]) -> None:
    """A microbatch; each call takes the worker so long."""
    work = meter.begin(_layout(*chunks))
    for _ in range(SITES if work is not None else 0):
        meter.observe(work, began_ns=7_000, ended_ns=7_000 + round(call_s * 1e9))


def _decodes(*contexts: int) -> list[tuple[int, int]]:
    return [(context - 1, 1) for context in contexts]


def test_positions_by_seconds_once_enough_calls_of_a_shape_came():
    meter = SpeedMeter(num_sites=SITES, window=None)
    _run(meter, 2.0, *_decodes(100, 300))  # it compiles
    for _ in range(2):
        _run(meter, 0.004, *_decodes(100, 300))
        assert meter.speed is None
    _run(meter, 0.004, *_decodes(101, 299))
    assert meter.speed == pytest.approx(100_000)


def test_prefill_first_calls_and_short_ones_say_nothing_and_single_slow_ones_little():
    """A worker of 50,000 positions a second, off by a twentieth at most, but for these."""
    meter, chance, compiled = SpeedMeter(num_sites=SITES, window=None), random.Random(0), set()
    for turn in range(40):
        contexts = [chance.randrange(50, 200) for _ in range(chance.choice([2, 6, 12]))]
        call_s = sum(contexts) / 50_000 * chance.uniform(0.95, 1.05)
        shapes = tuple(array.shape for array in vars(_layout(*_decodes(*contexts))).values())
        _run(meter, 3.0 if shapes not in compiled or turn % 8 == 7 else call_s, *_decodes(*contexts))
        compiled.add(shapes)
        _run(meter, 0.1, (0, 40), *_decodes(60))
        _run(meter, 0.0009, *_decodes(2))
        if turn > 8:
            assert meter.speed == pytest.approx(50_000, rel=0.05)


def test_it_follows_a_worker_that_becomes_slow():
    meter = SpeedMeter(num_sites=SITES, window=None)
    for call_s in [0.004] * 20 + [0.016] * 9:
        _run(meter, call_s, *_decodes(400))
    assert meter.speed == pytest.approx(25_000)


def test_no_row_attends_to_more_than_the_window():
    meter = SpeedMeter(num_sites=SITES, window=64)
    for _ in range(4):
        _run(meter, 0.002, *_decodes(30, 64, 900))
    assert meter.speed == pytest.approx((30 + 64 + 64) / 0.002)
