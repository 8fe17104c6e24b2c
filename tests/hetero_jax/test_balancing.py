"""Workers of several speeds in one job: who holds how much, and that tokens never depend on it."""

from __future__ import annotations

import dataclasses
import functools
import time

import pytest

import hetero_jax as hj
from fault_job import WAIT_S
from hetero_jax.tracing import Trace
from small_model import SmallModel
from transport import Attend, Layout, Result
from worker_thread import FaultyHandler, ThreadWorker

TOKENS = 250
PROMPTS = [[1 + n, 2, 3, 5, 8][: 2 + n % 4] for n in range(12)]
ROWS = sum(len(prompt) + TOKENS - 1 for prompt in PROMPTS)  # each once


class _PacedHandler(FaultyHandler):
    """Says by its own clock that a call takes so long for each KV position that it attends to."""

    ns_per_position = 1_000_000
    clock_ns = 0

    def layout(self, layout: Layout) -> None:
        self.positions = getattr(self, "positions", {}) | {layout.slot: int(layout.arrays["context"].sum())}
        super().layout(layout)

    def attend(self, attend: Attend) -> Result:
        result = super().attend(attend)
        began_ns = self.clock_ns
        self.clock_ns += self.positions[attend.layout] * self.ns_per_position
        return dataclasses.replace(result, began_ns=began_ns, ended_ns=self.clock_ns)


def _worker() -> ThreadWorker:
    worker = ThreadWorker(kv_cache_bytes=8 << 20)
    worker.handler.__class__ = _PacedHandler
    return worker


@functools.cache
def _plan() -> hj.Plan:
    small = SmallModel()
    return hj.partition(small, small.params(), max_rows=TOKENS + 8)


def _run(engine: hj.Engine, after=lambda count: None) -> dict[str, tuple[int, ...]]:
    """Tokens of the long requests, and of a short one that ends before them."""
    params = hj.SamplingParams(max_tokens=TOKENS, temperature=1, seed=3, ignore_eos=True)
    requests = [hj.Request(id=str(n), prompt_token_ids=tuple(p), sampling_params=params) for n, p in enumerate(PROMPTS)]
    short = hj.Request(id="short", prompt_token_ids=(7,), sampling_params=dataclasses.replace(params, max_tokens=40))
    found = {}
    for completion in engine.generate([*requests, short]):
        found[completion.id] = completion.token_ids
        after(completion.id)
    return found


@functools.cache
def _undisturbed() -> dict[str, tuple[int, ...]]:
    return _run(hj.Engine(_plan(), hj.EngineConfig(kv_cache_bytes=8 << 20, page_size=16)))


def _engine(**config) -> hj.Engine:
    engine = hj.Engine(_plan(), hj.EngineConfig(wire_dtype="float32", page_size=16, num_microbatches=2, **config))
    engine.trace = Trace()
    return engine


def _shares(engine: hj.Engine, *workers: ThreadWorker) -> list[float]:
    """Of the KV positions when they were most, by worker."""
    counts: list[list[int]] = [
        [value for name, _, value in engine.trace.counts if name == f"KV positions of {worker.address}"]
        for worker in workers
    ]
    fewest = min(map(len, counts))  # of the one that joined last
    totals = [sum(at) for at in zip(*(each[-fewest:] for each in counts), strict=True)]
    peak = totals.index(max(totals)) - fewest
    return [each[peak] / max(totals) for each in counts]


def test_sequences_go_over_to_the_faster_worker_until_shares_are_those_of_the_speeds():
    with _worker() as slow, _worker() as fast:
        slow.handler.ns_per_position = 3 * fast.handler.ns_per_position
        engine = _engine(workers=(slow.address, fast.address))
        assert _run(engine) == _undisturbed()
        assert _shares(engine, slow, fast) == pytest.approx([3 / 12, 9 / 12], abs=0.02)
    assert engine.stats.sequences_moved >= 3 and engine.stats.rows_computed == ROWS + 40


def test_a_worker_that_joins_takes_its_share_of_what_runs(tmp_path):
    path = tmp_path / "workers"
    with _worker() as first, _worker() as second:
        path.write_text(f"{first.address}\n")
        engine = _engine(workers_file=str(path))

        def grow(request_id: str) -> None:
            if request_id == "short":
                path.write_text(f"{first.address}\n{second.address}\n")
                end_s = time.monotonic() + WAIT_S
                while len(engine._fleet.sessions) == 1 and time.monotonic() < end_s:
                    engine._fleet.follow(engine._scheduler)
                    time.sleep(0.05)

        assert _run(engine, grow) == _undisturbed()
        assert _shares(engine, first, second) == pytest.approx([6 / 12, 6 / 12], abs=0.1)
    assert engine.stats.rows_computed == ROWS + 40


def test_a_worker_that_becomes_slow_is_relieved():
    with _worker() as first, _worker() as second:
        engine = _engine(workers=(first.address, second.address))

        def slow_down(request_id: str) -> None:
            if request_id == "short":
                first.handler.ns_per_position *= 5

        assert _run(engine, slow_down) == _undisturbed()
        assert _shares(engine, first, second) == pytest.approx([2 / 12, 10 / 12], abs=0.1)
    assert engine.stats.sequences_moved >= 3 and engine.stats.rows_computed == ROWS + 40
