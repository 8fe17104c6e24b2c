"""Losing a worker costs time, never output: the tokens are those of an engine that keeps its attention to itself."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable

import pytest

import hetero_jax as hj
from hetero_jax.errors import WorkerError
from small_model import SmallModel
from worker_process import worker_process
from worker_thread import ThreadWorker

REQUESTS = [
    hj.Request(
        id=str(n),
        prompt_token_ids=tuple([1 + n, 2, 3, 5, 8][: 1 + n % 5]),
        sampling_params=hj.SamplingParams(max_tokens=2 + 3 * n, temperature=1, seed=3, ignore_eos=True),
    )
    for n in range(10)
]


@functools.cache
def _plan() -> hj.Plan:
    small = SmallModel()
    return hj.partition(small, small.params(), max_rows=64)


def _tokens(engine: hj.Engine, after: Callable[[int], object] = lambda count: None) -> dict[str, tuple[int, ...]]:
    """after: called with how many completions there are."""
    found: dict[str, tuple[int, ...]] = {}
    for completion in engine.generate(REQUESTS):
        assert completion.id not in found
        found[completion.id] = completion.token_ids
        after(len(found))
    assert engine.stats.pages_used == 0
    return found


@functools.cache
def _undisturbed() -> dict[str, tuple[int, ...]]:
    return _tokens(hj.Engine(_plan(), hj.EngineConfig(kv_cache_bytes=1 << 20)))


def _engine(*workers: str, **config) -> hj.Engine:
    return hj.Engine(
        _plan(), hj.EngineConfig(workers=workers, wire_dtype="float32", max_num_batched_tokens=16, **config)
    )


@pytest.mark.parametrize("at", [0, 1, 9, 30])
def test_another_worker_goes_on_with_what_a_dead_one_had(at):
    with ThreadWorker(at, ThreadWorker.die) as dying, ThreadWorker() as other:
        engine = _engine(dying.address, other.address)
        assert _tokens(engine) == _undisturbed()
        assert engine.stats.workers_lost == 1


@pytest.mark.parametrize("at", [0, 5, 25])
def test_the_only_worker_is_waited_for(at, caplog):
    returned: list[ThreadWorker] = []

    def die_and_return(worker: ThreadWorker) -> None:
        worker.die()
        threading.Timer(0.3, lambda: returned.append(worker.restart())).start()

    with ThreadWorker(at, die_and_return) as worker:
        engine = _engine(worker.address)
        assert _tokens(engine) == _undisturbed()
    with returned[0]:
        assert (engine.stats.workers_lost, returned[0].handler.sessions) == (1, 1)
    assert sum("waiting up to 600 s" in record.message for record in caplog.records) == 1


def test_where_none_returns_the_job_ends_with_one_error():
    with ThreadWorker(5, ThreadWorker.die) as worker:
        engine = _engine(worker.address, worker_wait_s=0.3)
        with pytest.raises(WorkerError, match=f"no worker could go on with the job for 0.3 s.*{worker.address}"):
            _tokens(engine)


def test_one_that_is_alive_but_stuck_counts_as_lost_and_its_late_answer_for_nothing():
    released = threading.Event()
    with ThreadWorker(7, lambda worker: released.wait() and None) as stuck, ThreadWorker() as other:
        engine = _engine(stuck.address, other.address, step_timeout_s=1.5)
        assert _tokens(engine, lambda count: count == 9 and released.set()) == _undisturbed()
    assert engine.stats.workers_lost >= 1


def test_workers_in_processes_are_killed_and_stopped():
    with (
        worker_process("--kv_cache_bytes=1M") as (killed, first),
        worker_process("--kv_cache_bytes=1M") as (stopped, second),
        ThreadWorker() as last,
    ):
        engine = _engine(killed, stopped, last.address, step_timeout_s=3.0)
        faults = {2: first.kill, 4: lambda: second.send_signal(signal.SIGSTOP)}
        assert _tokens(engine, lambda count: faults.get(count, int)()) == _undisturbed()
    assert engine.stats.workers_lost == 2


def test_a_worker_that_drains_is_left_and_exits():
    with worker_process("--kv_cache_bytes=1M") as (address, process), ThreadWorker() as other:
        engine = _engine(address, other.address)
        assert _tokens(engine, lambda count: count == 2 and process.terminate()) == _undisturbed()
        assert process.wait(60) == 0
        assert engine.stats.workers_lost == 0
