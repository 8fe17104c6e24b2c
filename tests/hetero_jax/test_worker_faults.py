"""Losing a worker costs time, never output: the tokens are those of an engine that keeps its attention to itself."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import pytest

import hetero_jax as hj
from fault_job import engine_of, run, undisturbed
from golden import first_difference, golden_rows
from hetero_jax.errors import WorkerError
from worker_process import worker_process
from worker_thread import ThreadWorker

PARTITIONS = pytest.mark.parametrize("partition", ["sequence", "head"])


@PARTITIONS
@pytest.mark.parametrize(("at", "query_ahead_s"), [(0, 1.0), (1, 1.0), (9, 0.0), (30, 1.0)])
def test_another_worker_goes_on_with_what_a_dead_one_had(at, query_ahead_s, partition):
    with ThreadWorker(at, ThreadWorker.die) as dying, ThreadWorker() as other:
        engine = engine_of(dying.address, other.address, kv_partition=partition, query_ahead_s=query_ahead_s)
        assert run(engine) == undisturbed()
        assert engine.stats.workers_lost == 1


@pytest.mark.parametrize(("at", "partition"), [(0, "sequence"), (5, "sequence"), (25, "sequence"), (5, "head")])
def test_the_only_worker_is_waited_for(at, partition, caplog):
    returned: list[ThreadWorker] = []

    def die_and_return(worker: ThreadWorker) -> None:
        worker.die()
        threading.Timer(0.3, lambda: returned.append(worker.restart())).start()

    with ThreadWorker(at, die_and_return) as worker:
        engine = engine_of(worker.address, kv_partition=partition)
        assert run(engine) == undisturbed()
    with returned[0]:
        assert (engine.stats.workers_lost, returned[0].handler.sessions) == (1, 1)
    assert sum("waiting up to 600 s" in record.message for record in caplog.records) <= 1


@PARTITIONS
def test_where_none_returns_the_job_ends_with_one_error(partition):
    with ThreadWorker(5, ThreadWorker.die) as worker:
        engine = engine_of(worker.address, kv_partition=partition, worker_wait_s=0.3)
        with pytest.raises(WorkerError, match=f"no worker could go on with the job for 0.3 s.*{worker.address}"):
            run(engine)


@PARTITIONS
def test_one_that_is_alive_but_stuck_counts_as_lost_and_its_late_answer_for_nothing(partition):
    released = threading.Event()
    with ThreadWorker(7, lambda worker: released.wait() and None) as stuck, ThreadWorker() as other:
        engine = engine_of(stuck.address, other.address, kv_partition=partition, step_timeout_s=1.5)
        assert run(engine, lambda count: count == 9 and released.set()) == undisturbed()
    assert engine.stats.workers_lost >= 1


@PARTITIONS
def test_workers_in_processes_are_killed_and_stopped(partition):
    with (
        worker_process("--kv_cache_bytes=1M") as (killed, first),
        worker_process("--kv_cache_bytes=1M") as (stopped, second),
        ThreadWorker() as last,
    ):
        engine = engine_of(killed, stopped, last.address, kv_partition=partition, step_timeout_s=3.0)
        faults = {2: first.kill, 4: lambda: second.send_signal(signal.SIGSTOP)}
        assert run(engine, lambda count: faults.get(count, int)()) == undisturbed()
    assert engine.stats.workers_lost == 2


@PARTITIONS
def test_golden_tokens_while_workers_join_drain_and_die(smollm2_gguf, tmp_path, partition):
    short = [row for row in golden_rows() if len(row["prompt_ids"]) < 60][:10]
    rows = {row["id"]: {**row, "greedy_ids": row["greedy_ids"][: 3 + 2 * n]} for n, row in enumerate(short)}
    greedy = [hj.SamplingParams(max_tokens=3 + 2 * n, temperature=0, ignore_eos=True) for n in range(10)]
    requests = [
        hj.Request(id=row["id"], prompt_token_ids=tuple(row["prompt_ids"]), sampling_params=sampling)
        for row, sampling in zip(short, greedy, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(ThreadWorker(kv_cache_bytes=24 << 20)) for _ in range(3))
        file = tmp_path / "workers"
        file.write_text(first.address)
        model = hj.load(str(smollm2_gguf))
        sizes = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 128}
        workers = {"workers_file": str(file), "kv_partition": partition}
        engine = hj.Engine(model, hj.EngineConfig(**workers, wire_dtype="float32", **sizes))
        join = lambda: file.write_text(f"{first.address}\n{second.address}\n{third.address}\n")  # noqa: E731
        faults = {1: join, 4: lambda: first.server.drain("a test"), 7: second.die}
        tokens = {}
        for completion in engine.generate(requests):
            tokens[completion.id] = completion.token_ids
            faults.get(len(tokens), int)()
            time.sleep(0.6)  # the file is looked at now and then
    assert tokens.keys() == rows.keys()
    assert all(first_difference(rows[row_id], found) is None for row_id, found in tokens.items())
    assert engine.stats.workers_lost == 1
    assert min(worker.handler.served for worker in (first, second, third)) > 0


@PARTITIONS
def test_a_worker_that_drains_is_left_and_exits(partition):
    with worker_process("--kv_cache_bytes=1M") as (address, process), ThreadWorker() as other:
        engine = engine_of(address, other.address, kv_partition=partition)
        assert run(engine, lambda count: count == 2 and process.terminate()) == undisturbed()
        assert process.wait(60) == 0
        assert engine.stats.workers_lost == 0
