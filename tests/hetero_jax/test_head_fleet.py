"""KV heads to workers: who takes part, who is left out, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import hetero_jax as hj
from fault_job import engine_of, run, undisturbed
from hetero_jax.errors import ConfigError
from small_model import SmallModel
from worker_thread import ThreadWorker
from zoo_attention import sigmoid

WAIT_S = 60  # for what must happen; nothing here is timed


def _await(engine: hj.Engine, happened: Callable[[], bool]) -> None:
    """Follow the workers, without any work for them, until it has."""
    end_s = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end_s
        engine._follow_workers()
        time.sleep(0.01)


def _left_out(caplog) -> list[str]:
    return [record.message for record in caplog.records if "is left out" in record.message]


def test_who_comes_when_every_head_has_a_worker_stands_by_for_one_that_dies(tmp_path, caplog):
    file = tmp_path / "workers"
    with ThreadWorker() as first, ThreadWorker() as second, ThreadWorker() as third, ThreadWorker() as spare:
        file.write_text(f"{first.address}\n{second.address}\n{third.address}\n")
        engine = engine_of(workers_file=str(file), kv_partition="head")
        file.write_text(f"{file.read_text()}{spare.address}\n")
        _await(engine, lambda: bool(_left_out(caplog)))
        pages = engine.stats.pages_total
        assert run(engine, lambda count: count == 4 and second.die()) == undisturbed()
        assert (engine.stats.workers_lost, engine.stats.pages_total) == (1, pages)
        assert min(worker.handler.served for worker in (first, second, third, spare)) > 0
    expected = f"worker {spare.address} is left out: there are 3 KV heads, one each for those that are there"
    assert _left_out(caplog) == [expected]


def test_who_would_make_the_pool_smaller_is_left_out(tmp_path, caplog):
    file = tmp_path / "workers"
    with ThreadWorker() as first, ThreadWorker(kv_cache_bytes=1 << 14) as small, ThreadWorker() as second:
        file.write_text(first.address)
        engine = engine_of(workers_file=str(file), kv_partition="head")
        pages = engine.stats.pages_total
        file.write_text(f"{first.address}\n{small.address}\n")
        _await(engine, lambda: bool(_left_out(caplog)))
        file.write_text(f"{first.address}\n{small.address}\n{second.address}\n")
        _await(engine, lambda: engine.stats.pages_total > pages)
        assert run(engine) == undisturbed()
        assert small.handler.served == 0 < second.handler.served
    assert [message.partition(": it holds ")[0] for message in _left_out(caplog)] == [
        f"worker {small.address} is left out"
    ]


def test_what_cannot_be_shared_out_by_heads_is_refused():
    with pytest.raises(ConfigError, match=r"kv_partition='head' with 4 workers; allowed for this model: at most 3, "):
        engine_of(*(f"127.0.0.1:{port}" for port in range(1, 5)), kv_partition="head")
    with pytest.raises(ConfigError, match="kv_partition='head' is not allowed; allowed: sequence, as there are no"):
        engine_of(kv_partition="head")
    with pytest.raises(ConfigError, match=r"kv_partition='both' is not allowed; allowed: one of \('sequence', 'head'"):
        engine_of("127.0.0.1:1", kv_partition="both")
    model = SmallModel(attention=sigmoid)
    plan = hj.partition(model, model.params(), max_rows=64)
    with pytest.raises(ConfigError, match=r"kv_partition='head', but the heads of .*zoo_attention\.py.* 'sequence'$"):
        hj.Engine(plan, hj.EngineConfig(workers=("127.0.0.1:1",), kv_partition="head"))
