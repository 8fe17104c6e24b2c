"""A draining worker's sequences go on elsewhere with their pages: no row is computed twice, and the tokens stay."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import hetero_jax as hj
from fault_job import REQUESTS, WAIT_S, engine_of, plan, run, undisturbed, wait_for_drain
from hetero_jax import worker, worker_session
from hetero_jax.errors import ConfigError
from transport import FetchPages, Pages, StorePages
from worker_process import worker_process
from worker_thread import ThreadWorker

ROWS = sum(len(each.prompt_token_ids) + each.sampling_params.max_tokens - 1 for each in REQUESTS)  # each once


def test_sigterm_of_a_workers_process_moves_its_pages():
    with (
        worker_process("--kv_cache_bytes=1M") as (leaving, process),
        worker_process("--kv_cache_bytes=1M") as (stays, _),
    ):
        engine = engine_of(leaving, stays)

        def leave(count: int) -> None:
            if count == 2:
                process.terminate()
                wait_for_drain(engine)

        assert run(engine, leave) == undisturbed()
        assert process.wait(WAIT_S) == 0
    assert engine.stats.sequences_moved > 0
    assert (engine.stats.rows_computed, engine.stats.workers_lost) == (ROWS, 0)


def _run_and_drain(leaving: ThreadWorker, *others: ThreadWorker) -> hj.Engine:
    engine = engine_of(leaving.address, *(other.address for other in others))

    def leave(count: int) -> None:
        if count == 6:  # what is left has more than one page
            leaving.server.drain("a test")
            wait_for_drain(engine)

    assert run(engine, leave) == undisturbed()
    return engine


def test_pages_travel_in_messages_of_a_bounded_size(monkeypatch):
    tier = hj.Engine(plan(), hj.EngineConfig(kv_cache_bytes=1 << 20, page_size=16))._attention
    page_bytes = tier.pool_bytes // tier.num_pages
    for module in (worker_session, worker):
        monkeypatch.setattr(module, "MAX_PAGES_BYTES", page_bytes)
    sizes: list[int] = []
    with ThreadWorker() as leaving, ThreadWorker() as other:

        def fetch(message: FetchPages) -> Pages:
            answer = worker.TierHandler.fetch_pages(leaving.handler, message)
            sizes.append(sum(array.nbytes for array in answer.arrays))
            return answer

        leaving.handler.fetch_pages = fetch
        engine = _run_and_drain(leaving, other)
        with pytest.raises(ConfigError, match=f"2 pages of {2 * page_bytes} bytes; allowed: at most {page_bytes}"):
            fetch(FetchPages(request_id=1, pages=np.arange(2)))
    assert engine.stats.rows_computed == ROWS
    assert set(sizes) == {page_bytes} and len(sizes) > engine.stats.sequences_moved > 0


def test_a_source_that_is_lost_on_the_way_costs_rows_and_no_tokens():
    with ThreadWorker() as leaving, ThreadWorker() as other:
        leaving.handler.fetch_pages = lambda message: leaving.die()
        engine = _run_and_drain(leaving, other)
    assert engine.stats.rows_computed > ROWS and engine.stats.sequences_moved == 0


def test_a_target_that_is_lost_on_the_way_costs_rows_and_no_tokens():
    with ThreadWorker() as leaving, ThreadWorker() as first, ThreadWorker() as second:
        died: list[ThreadWorker] = []

        def store(target: ThreadWorker, message: StorePages) -> None:
            if died:
                return worker.TierHandler.store_pages(target.handler, message)
            died.append(target)
            return target.die()

        for target in (first, second):
            target.handler.store_pages = functools.partial(store, target)
        engine = _run_and_drain(leaving, first, second)
    assert engine.stats.rows_computed > ROWS and engine.stats.workers_lost == len(died) == 1


def test_pages_too_large_for_a_message_do_not_travel(monkeypatch, caplog):
    monkeypatch.setattr(worker_session, "MAX_PAGES_BYTES", 100)
    with ThreadWorker() as leaving, ThreadWorker() as other:
        engine = _run_and_drain(leaving, other)
    assert engine.stats.sequences_moved == 0 and engine.stats.rows_computed > ROWS
    assert any("sequences left without their pages and are computed again" in each.message for each in caplog.records)
